"""What is known of a slice before any pixel of training is read: from its mask, once, or from the user's table."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.cache.files import cache_errors
from kmine.data.source import require_table, size_and_time
from kmine.errors import UserError

FORMAT = 1
"""Raise it when the facts change their meaning."""
HEADER = ["sample_id", "label"]
SLICE_ID = re.compile(r"volume-(\d{1,255})/slice-(\d{1,255})")
"""No file name has more digits, and int() refuses thousands of them."""


@dataclass(frozen=True)
class SliceFacts:
    """Numbers of the slices of one mask that show liver (tumour included), and tumour."""

    liver: frozenset[int]
    tumour: frozenset[int]


def facts_of(mask: NDArray[np.uint8]) -> SliceFacts:
    """The facts of a decoded mask, (D, H, W) of 0 background, 1 liver, 2 tumour."""
    liver, tumour = ((mask >= label).any(axis=(1, 2)) for label in (1, 2))
    return SliceFacts(*(frozenset(np.flatnonzero(shown).tolist()) for shown in (liver, tumour)))


def facts_path(folder: Path, mask: Path, *cut: object) -> Path:
    """Where the facts of a mask file lie: another size, modification time or way to cut it is another file."""
    key = hashlib.sha256(json.dumps([FORMAT, mask.name, *size_and_time(mask), *cut]).encode()).hexdigest()
    return folder / f"{mask.name.partition('.')[0]}-{key[:16]}.json"


def load_facts(path: Path) -> SliceFacts | None:
    """What `save_facts` wrote; None where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        return SliceFacts(frozenset(map(int, content["liver"])), frozenset(map(int, content["tumour"])))
    except (OSError, ValueError, TypeError, KeyError):  # no file; no text or JSON; JSON of something else
        return None


def save_facts(path: Path, facts: SliceFacts) -> None:
    """Write the facts, whole or not at all. Raises `UserError` where nothing can be stored."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    with cache_errors(path.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(json.dumps({"liver": sorted(facts.liver), "tumour": sorted(facts.tumour)}))
        temp.replace(path)


def read_image_labels(
    path: Path, num_slices: Mapping[int, int], unread: Collection[str] = ()
) -> dict[int, dict[int, int]]:
    """The user's image-level labels.

    Args:
        path: CSV with the columns sample_id (volume-003/slice-0042) and label (0 or 1).
        num_slices: of each volume, by its number.
        unread: volumes (volume-003) that could not be read; their rows are passed over.

    Returns:
        Label by slice number by volume number.

    Raises:
        UserError: with the line number, for an id that is unknown or there twice, and for another label than 0 or 1.
    """
    labels: dict[int, dict[int, int]] = {}
    for line, row in _rows(path):
        if len(row) != len(HEADER):
            raise UserError(f"{path}, line {line}: expected sample_id,label, got {len(row)} values; mend that line")
        volume, number = _parse_slice_id(path, line, row[0])
        if f"volume-{volume:03}" in unread:
            continue
        if not 0 <= number < num_slices.get(volume, 0):
            has = (
                f"volume {volume} has slices 0 to {num_slices[volume] - 1}"
                if volume in num_slices
                else "no such volume"
            )
            raise UserError(f"{path}, line {line}: unknown sample_id {row[0]!r} ({has}); remove or mend that line")
        if row[1].strip() not in ("0", "1"):
            raise UserError(f"{path}, line {line}: expected the label 0 (no lesion) or 1 (lesion), got {row[1]!r}")
        if number in labels.setdefault(volume, {}):
            raise UserError(f"{path}, line {line}: expected each slice once, got {row[0]} again; remove one line")
        labels[volume][number] = int(row[1])
    if not labels:
        raise UserError(f"{path}: expected rows sample_id,label, got none of a volume that can be read")
    return labels


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each row below the header that is not empty."""
    require_table(path, "data.image_labels")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if [name.strip() for name in header] != HEADER:
                raise UserError(f"{path}, line 1: expected the header sample_id,label, got {','.join(header)!r}")
            yield from ((reader.line_num, row) for row in reader if row)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); data.image_labels expects a CSV file of sample_id,label"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file of sample_id,label, got something else ({error})") from error


def _parse_slice_id(path: Path, line: int, sample_id: str) -> tuple[int, int]:
    """Numbers of the volume and of the slice."""
    match = SLICE_ID.fullmatch(sample_id.strip())
    if not match:
        raise UserError(f"{path}, line {line}: expected a sample_id like volume-003/slice-0042, got {sample_id!r}")
    return int(match[1]), int(match[2])
