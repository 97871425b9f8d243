"""Table of a user's images: CSV with columns image, mask, group, label, split, checked line by line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kmine.data.datasets.folder_index import KINDS, Item, file_kind, mismatch, split_suffix
from kmine.data.source import OnError, csv_rows, is_file
from kmine.errors import UserError
from kmine.io.errors import expanded
from kmine.types import Skipped

COLUMNS = ("image", "mask", "group", "label", "split")
SPLITS = ("train", "val", "test")
LABELS = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
"""pandas writes a column of whole numbers with gaps as 1.0."""
MISSING = {"nan", "<na>", "none", "null"}
"""Missing values in words."""


def read_folder_csv(path: Path, on_error: OnError) -> tuple[list[Item], tuple[Skipped, ...]]:
    """Images of the table, sorted by name, and rows left out; no image is opened.

    Args:
        path: CSV file with a header; only the column image is required. Paths are relative to its folder.
        on_error: whether a missing file stops, or is listed.

    Raises:
        UserError: with the line number, for any deviation from the format of `data.csv`.
    """
    items: dict[str, Item] = {}
    lines: dict[str, int] = {}
    skipped: list[Skipped] = []
    first = 0
    for line, row in _rows(path):
        where, first = f"{path}, line {line}", first or line
        item = _item(where, row, path.parent)
        if item.name in lines:
            raise UserError(
                f"{where}: expected each image once (suffixes apart), got {row['image']} again, as in line "
                f"{lines[item.name]}; remove or rename one"
            )
        lines[item.name] = line
        if not is_file(item.image):
            skipped.append(_missing(where, item.name, item.image, "image", on_error))
        elif item.mask is not None and not is_file(item.mask):
            skipped.append(_missing(where, item.name, item.mask, "mask", on_error))
        else:
            items[item.name] = item
    if not first:
        raise UserError(f"{path}: expected rows of {','.join(COLUMNS)}, got none below the header")
    if not items:
        raise UserError(f"{path}: expected images, found none of its {len(skipped)}; check the paths")
    ordered = [items[name] for name in sorted(items)]
    _check_splits(path, sorted(ordered, key=lambda item: lines[item.name]), lines)
    return ordered, tuple(skipped)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column of each non-empty row."""
    rows = csv_rows(path, "data.csv")
    first, names = next(rows, (1, []))
    header = [name.lower() for name in names]
    if "image" not in header or set(header) - set(COLUMNS) or len(set(header)) < len(header):
        raise UserError(
            f"{path}, line {first}: expected a header of image and any of {', '.join(COLUMNS[1:])}, separated by "
            f"commas, got {','.join(header)!r}; mend that line, and remove other columns"
        )
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}: expected {len(header)} values ({','.join(header)}), got {len(row)}; mend that "
                "line, with quotes around values that hold commas"
            )
        values = ("" if value.lower() in MISSING else value for value in row)
        yield line, dict.fromkeys(COLUMNS, "") | dict(zip(header, values, strict=True))


def _item(where: str, row: dict[str, str], folder: Path) -> Item:
    """Checked item of a row."""
    if not row["image"]:
        raise UserError(f"{where}: expected an image, got an empty value; fill it in or remove the line")
    image, mask = (folder / (expanded(row[c]) if row[c].startswith("~/") else row[c]) for c in ("image", "mask"))
    mask = mask if row["mask"] else None
    kind = file_kind(image)
    if kind is None:
        raise UserError(f"{where}: expected a {KINDS} file, got {row['image']!r}; convert it")
    if problem := mismatch(image, mask):
        raise UserError(f"{where}: {problem}")
    if row["label"] not in LABELS:
        expected = "the label 0 (free of the last class), 1 (shows it) or nothing"
        raise UserError(f"{where}: expected {expected}, got {row['label']!r}")
    if kind == "nifti" and row["label"] == "1":
        raise UserError(
            f"{where}: expected no label or 0 for a volume, got 1, which cannot hold for every slice; leave it empty"
        )
    split = row["split"].lower()
    if split and split not in SPLITS:
        raise UserError(f"{where}: expected the split {', '.join(SPLITS)} or nothing, got {row['split']!r}")
    if split in ("val", "test") and mask is None:
        raise UserError(f"{where}: expected a mask for an image of {split}, got none; name one, or move it to train")
    name = split_suffix(Path(os.path.relpath(image, folder)).as_posix())[0]
    return Item(name, image, mask, row["group"] or None, LABELS[row["label"]], split or None)


def _missing(where: str, name: str, path: Path, what: str, on_error: OnError) -> Skipped:
    if on_error == "stop":
        raise UserError(
            f"{where}: expected the {what} {path}, found no such file; mend the path (it is relative to the table's "
            "folder), or pass --data.on_error skip to leave the row out"
        )
    return Skipped(name, str(path), f"no such {what}")


def _check_splits(path: Path, items: list[Item], lines: dict[str, int]) -> None:
    """All rows or none have a split, and no group straddles two."""
    sides: dict[str, Item] = {}
    for item in items:
        where = f"{path}, line {lines[item.name]}"
        if (item.split is None) != (items[0].split is None):
            raise UserError(
                f"{where}: expected a split in every row or in none, got {item.split or 'nothing'} after "
                f"{items[0].split or 'nothing'}; write train for the rest, or empty the column"
            )
        other = sides.setdefault(item.group, item) if item.group is not None else item
        if other.split != item.split:
            raise UserError(
                f"{where}: expected the group {item.group} in one split, got {item.split}, but {other.split} in line "
                f"{lines[other.name]}; move all of it to one"
            )
