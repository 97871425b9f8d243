"""Boxes, points and scribbles that a person drew on images without masks: `prompts.file`, a CSV table or COCO's JSON.

Coordinates are pixels (x, y) of the image's own frame, where (0, 0) is the centre of the first pixel.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.folder_index import split_suffix
from kmine.data.source import csv_rows
from kmine.errors import UserError, first_names
from kmine.io.json_file import parse_json, read_regular
from kmine.types import Prompts

COLUMNS = ("sample_id", "class", "box", "points", "background", "scribble")
MAX_SCRIBBLE = 8
"""Points that stand for a scribble, at equal distances along it. Own choice: the decoders were trained with few."""
SETTING = "prompts.file"


@dataclass(frozen=True)
class PersonPrompts:
    """Prompts of a person by sample id, in the order of the file, and the SHA-256 of the file."""

    by_sample: Mapping[str, tuple[Prompts, ...]]
    sha256: str = ""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where each sample's first prompt stands in the file, for messages."""


NO_PERSON = PersonPrompts({})


def read_person_prompts(setting: str | None, class_names: Sequence[str], sample_ids: Sequence[str]) -> PersonPrompts:
    """The prompts of `prompts.file`; ids may have the suffix of the image's file. No image is read.

    A table has the column sample_id and any of class (name or id; not needed with one foreground class), box
    ("x0 y0 x1 y1", ends inclusive), points and background ("x y; x y") and scribble (points of a line within the
    object, "x y; x y"); one row an object. Of COCO's JSON, images, categories and the bbox of each annotation are read;
    [x, y, w, h] there is the box from the pixel (x, y) to the pixel (x + w - 1, y + h - 1).

    Raises:
        UserError: a file that is missing or of another format, an unknown image or class, a row without prompts.
    """
    if setting is None:
        return NO_PERSON
    path, known = Path(setting), set(sample_ids)
    content = read_regular(
        path, "boxes, points and scribbles of a person", f"name a CSV table or a JSON file, {SETTING}"
    )
    is_json = content.lstrip()[:1] in (b"{", b"[")
    rows = _of_coco(path, content, class_names) if is_json else _of_table(path, class_names)
    found: dict[str, list[Prompts]] = defaultdict(list)
    places: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for where, name, prompts in rows:
        sample_id = next((i for i in (name, split_suffix(name)[0], split_suffix(Path(name).name)[0]) if i in known), "")
        if not sample_id:
            unknown.setdefault(name, where)
            continue
        found[sample_id].append(prompts)
        places.setdefault(sample_id, where)
    if unknown:
        raise UserError(
            f"{next(iter(unknown.values()))}: expected images of the data set, got {len(unknown)} that it does not "
            f"have: {first_names(sorted(unknown))}; use the sample ids of a run's splits.csv, or remove them"
        )
    by_sample = {sample_id: tuple(prompts) for sample_id, prompts in found.items()}
    return PersonPrompts(by_sample, hashlib.sha256(content).hexdigest(), places)


def _of_table(path: Path, class_names: Sequence[str]) -> Iterator[tuple[str, str, Prompts]]:
    """(place, image, prompts) of each row."""
    rows = csv_rows(path, SETTING)
    line, header = next(rows, (1, []))
    if "sample_id" not in header or set(header) - set(COLUMNS) or len(set(header)) < len(header):
        raise UserError(
            f"{path}, line {line}: expected a header of sample_id and any of {', '.join(COLUMNS[1:])}, got "
            f"{','.join(header)!r}; mend that line, and remove other columns"
        )
    for line, values in rows:
        where = f"{path}, line {line}"
        if len(values) != len(header):
            raise UserError(
                f"{where}: expected {len(header)} values, got {len(values)}; put those that hold commas in quotes"
            )
        row = dict.fromkeys(COLUMNS, "") | dict(zip(header, values, strict=True))
        box = _numbers(where, "box", row["box"], 4)
        inside = [*_points(where, row, "points"), *_along(_points(where, row, "scribble"))]
        outside = _points(where, row, "background")
        if box is None and not inside:
            raise UserError(f"{where}: expected a box, points or a scribble, got none; fill one in, or remove the row")
        prompts = _prompts(_class_id(where, row["class"], class_names), box, inside, outside)
        yield where, row["sample_id"], prompts


def _of_coco(path: Path, content: bytes, class_names: Sequence[str]) -> Iterator[tuple[str, str, Prompts]]:
    """(place, image, prompts) of each annotation."""
    value = parse_json(content, str(path), "boxes of COCO", "export them again as COCO JSON")
    try:
        names = {image["id"]: str(image["file_name"]) for image in value["images"]}
        classes = {category["id"]: str(category["name"]) for category in value["categories"]}
        rows = [(names[a["image_id"]], classes[a["category_id"]], a["bbox"], a["id"]) for a in value["annotations"]]
        boxes = [np.array(bbox, np.float64).reshape(4) for _, _, bbox, _ in rows]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: expected COCO's JSON: images (id, file_name), categories (id, name), annotations (id, image_id, "
            f"category_id, bbox of 4 numbers); got another layout ({type(error).__name__}: {error}); export it again"
        ) from error
    for (name, kind, _, number), (x, y, width, height) in zip(rows, boxes, strict=True):
        where = f"{path}, annotation {number}"
        if not (width > 0 and height > 0):
            raise UserError(f"{where}: expected a bbox [x, y, width, height] with an area, got {width:g} x {height:g}")
        box = np.array([x, y, x + width - 1, y + height - 1])
        # A box of one pixel has an area for the segmenters only half a pixel further out.
        thin = np.array([width <= 1, height <= 1] * 2) * np.array([-0.5, -0.5, 0.5, 0.5])
        yield where, name, _prompts(_class_id(where, kind, class_names), box + thin, [], [])


def _class_id(where: str, given: str, class_names: Sequence[str]) -> int:
    names = [name.lower() for name in class_names]
    if len(names) == 2 and not given:
        return 1
    if given.lower() in names[1:]:
        return names.index(given.lower())
    if given.isdecimal() and 0 < int(given) < len(names):
        return int(given)
    expected = ", ".join(class_names[1:])
    raise UserError(f"{where}: expected a class of {expected} (or its id from 1 on), got {given!r}; mend the class")


def _prompts(class_id: int, box: NDArray[Any] | None, inside: Sequence[Any], outside: Sequence[Any]) -> Prompts:
    coords, labels = [*inside, *outside], [1] * len(inside) + [0] * len(outside)
    return Prompts(
        class_id,
        None if box is None else box.astype(np.float32),
        np.array(coords, np.float32) if coords else None,
        np.array(labels, np.int64) if coords else None,
        origin="person",
    )


def _numbers(where: str, column: str, text: str, count: int) -> NDArray[np.float64] | None:
    if not text:
        return None
    try:
        values = np.array([float(word) for word in text.replace(",", " ").split()])
    except ValueError:
        values = np.empty(0)
    if len(values) != count or not np.isfinite(values).all():
        form = "x0 y0 x1 y1" if count == 4 else "x y; x y"
        raise UserError(f"{where}: expected {column} as `{form}`, numbers in pixels, got {text!r}; mend it")
    return values


def _points(where: str, row: Mapping[str, str], column: str) -> list[NDArray[np.float64]]:
    parts = [part.strip() for part in row[column].split(";") if part.strip()]
    return [values for part in parts if (values := _numbers(where, column, part, 2)) is not None]


def _along(line: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """At most `MAX_SCRIBBLE` points at equal distances along a line of points, its ends included."""
    if len(line) < 2:
        return list(line)
    corners = np.stack(line)
    way = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
    stops = np.linspace(0, way[-1], min(MAX_SCRIBBLE, max(2, int(way[-1]) + 1)))
    return list(np.stack([np.interp(stops, way, corners[:, axis]) for axis in (0, 1)], axis=1))
