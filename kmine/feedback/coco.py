"""Corrected masks of a COCO file: run lengths and polygons, checked before they are filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from kmine.errors import UserError
from kmine.feedback.expected import CURE, ExpectedMasks, Mask, refuse_duplicates, refuse_unknown
from kmine.io.json_file import is_kind, json_field, kind_of
from kmine.ops.masks import Bool, fill_polygon, from_runs, run_lengths

Json = Mapping[str, Any]


def masks_of_coco(path: Path, value: Json, expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    """(sample id, mask) of each image of a COCO object; an image without annotations has an empty mask.

    Raises:
        UserError: missing or repeated ids, foreign images, classes and sizes, no or damaged segmentations.
    """
    where = str(path)
    images = _by_id(where, value, "images")
    names = {
        key: json_field(row, "name", str, where=f"{where}: category {key}", cure=CURE)
        for key, row in _by_id(where, value, "categories").items()
    }
    classes = expected.class_ids(where, names)
    of_image: dict[Any, list[Json]] = {key: [] for key in images}
    for number, row in enumerate(_rows(where, value, "annotations")):
        part = f"{where}: annotations[{number}]"
        for name, known in (("image_id", images), ("category_id", classes)):
            if json_field(row, name, int, str, where=part, cure=CURE) not in known:
                raise UserError(
                    f"{part}: expected the {name} of an entry of the file, got {kind_of(row[name])}; {CURE}"
                )
        of_image[row["image_id"]].append(row)
    ids = {key: expected.sample_id(image, "file_name", f"{where}: image {key}") for key, image in images.items()}
    refuse_unknown(path, [str(images[key].get("file_name")) for key, sample_id in ids.items() if sample_id is None])
    refuse_duplicates(path, ids.values(), "one image a sample")
    return (
        expected.check(where, name, _mask(where, name, images[key], of_image[key], classes, expected))
        for key, name in ids.items()
        if name is not None
    )


def _rows(where: str, value: Json, name: str) -> list[Json]:
    rows = json_field(value, name, list, NoneType, where=where, cure=CURE) or []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected {name}[{number}] to be an object, got {kind_of(row)}; {CURE}")
    return rows


def _by_id(where: str, value: Json, name: str) -> dict[Any, Json]:
    rows = [
        (json_field(row, "id", int, str, where=f"{where}: {name}[{number}]", cure=CURE), row)
        for number, row in enumerate(_rows(where, value, name))
    ]
    refuse_duplicates(Path(where), [str(key) for key, _ in rows], f"one id an entry of {name}")
    return dict(rows)


def _mask(
    where: str, name: str, image: Json, annotations: Sequence[Json], classes: Mapping[Any, int], expected: ExpectedMasks
) -> Mask:
    """(H, W) class ids of one image; later annotations on top."""
    size = [json_field(image, side, int, where=f"{where}: {name}", cure=CURE) for side in ("height", "width")]
    expected.check_size(where, name, *size)
    out = np.zeros(expected.shapes[name], np.uint8)
    for annotation in annotations:
        part = f"{where}: {name}, annotation {kind_of(annotation.get('id'))}"
        shape = json_field(annotation, "segmentation", list, dict, where=part, cure=CURE)
        try:
            region = _polygons(shape, *out.shape) if isinstance(shape, list) else _runs(shape, *out.shape, part)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{part}: {error}; {CURE}") from error
        out[region] = classes[annotation["category_id"]]
    return out


def _polygons(polygons: list[Any], height: int, width: int) -> Bool:
    if not polygons:
        raise ValueError("expected polygons or run lengths, got none (a box only?)")
    out = np.zeros((height, width), bool)
    for points in polygons:
        if not isinstance(points, list) or len(points) % 2 or not all(is_kind(v, float) for v in points):
            raise ValueError("expected each polygon as a list of x, y, x, y and so on, got something else")
        out |= fill_polygon(np.array(points, np.float64).reshape(-1, 2), height, width)
    return out


def _runs(runs: Json, height: int, width: int, where: str) -> Bool:
    size = json_field(runs, "size", list, where=where, cure=CURE)
    if size != [height, width]:
        raise ValueError(f"expected run lengths of the size [{height}, {width}], got {str(size)[:60]}")
    counts = json_field(runs, "counts", str, list, where=where, cure=CURE)
    if isinstance(counts, list) and not all(is_kind(v, int) for v in counts):
        raise ValueError("expected run lengths as whole numbers, got something else")
    return from_runs(run_lengths(counts) if isinstance(counts, str) else counts, height, width)
