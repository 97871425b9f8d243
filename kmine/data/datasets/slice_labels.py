"""Image-level labels of slices: from their masks, read once and cached, or from a table of the user."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.cache.files import cache_errors
from kmine.data.source import csv_rows, size_and_time
from kmine.errors import UserError
from kmine.io.json_file import load_json

FORMAT = 1
"""Increase it when the stored facts change their meaning."""
HEADER = ["sample_id", "label"]
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
TYPED_ID = re.compile(r"volume-(\d{1,255})/slice-(\d{1,255})")
"""A slice id as a user may write it, without leading zeros. int() refuses thousands of digits."""


@dataclass(frozen=True)
class SliceFacts:
    """Numbers of the slices of a mask that show liver (tumour included), and those that show tumour."""

    liver: frozenset[int]
    tumour: frozenset[int]


def facts_of(mask: NDArray[np.uint8]) -> SliceFacts:
    """Facts of a (D, H, W) mask of 0 background, 1 liver, 2 tumour."""
    liver, tumour = ((mask >= label).any(axis=(1, 2)) for label in (1, 2))
    return SliceFacts(*(frozenset(np.flatnonzero(shown).tolist()) for shown in (liver, tumour)))


def facts_path(folder: Path, mask: Path, *cut: object) -> Path:
    """Cache file for the facts of a mask; its name depends on size, modification time and `cut`, the geometry."""
    key = hashlib.sha256(json.dumps([FORMAT, mask.name, *size_and_time(mask), *cut]).encode()).hexdigest()
    return folder / f"{mask.name.partition('.')[0]}-{key[:16]}.json"


def load_facts(path: Path) -> SliceFacts | None:
    """Facts written by `save_facts`; None where the file is missing or damaged."""
    try:
        content = load_json(path, "facts of a mask", "remove it")
        return SliceFacts(frozenset(map(int, content["liver"])), frozenset(map(int, content["tumour"])))
    except (ValueError, TypeError, KeyError):  # no file, no JSON, other JSON
        return None


def save_facts(path: Path, facts: SliceFacts) -> None:
    """Write the facts atomically. Raises `UserError` where nothing can be stored."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    with cache_errors(path.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(json.dumps({"liver": sorted(facts.liver), "tumour": sorted(facts.tumour)}))
        temp.replace(path)


def read_image_labels(
    path: Path, num_slices: Mapping[int, int], unread: Collection[str] = ()
) -> dict[int, dict[int, int]]:
    """Read image-level labels: volume number -> slice number -> label.

    Args:
        path: CSV with the columns sample_id (volume-003/slice-0042) and label (0 or 1).
        num_slices: number of slices by volume number.
        unread: volumes (volume-003) that could not be read; their rows are ignored.

    Raises:
        UserError: with the line number, for an unknown or repeated id and for another label than 0 or 1.
    """
    labels: dict[int, dict[int, int]] = {}
    rows = csv_rows(path, "data.image_labels")
    first, header = next(rows, (1, []))
    if [name.lower() for name in header] != HEADER:
        raise UserError(f"{path}, line {first}: expected the header sample_id,label, got {','.join(header)!r}")
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) != len(HEADER):
            raise UserError(f"{where}: expected sample_id,label, got {len(row)} values; mend that line")
        match = TYPED_ID.fullmatch(row[0])
        if not match:
            raise UserError(f"{where}: expected a sample_id like volume-003/slice-0042, got {row[0]!r}")
        volume, number = int(match[1]), int(match[2])
        if f"volume-{volume:03}" in unread:
            continue
        count = num_slices.get(volume)
        if number >= (count or 0):
            has = "no such volume" if count is None else f"volume {volume} has slices 0 to {count - 1}"
            raise UserError(f"{where}: unknown sample_id {row[0]!r} ({has}); remove or mend that line")
        if row[1] not in LABELS:
            raise UserError(f"{where}: expected the label 0 (no lesion) or 1 (lesion), got {row[1]!r}")
        if number in labels.setdefault(volume, {}):
            raise UserError(f"{where}: expected each slice once, got {row[0]} again; remove one line")
        labels[volume][number] = LABELS[row[1]]
    if not labels:
        raise UserError(f"{path}: expected rows sample_id,label, got none of a volume that can be read")
    return labels
