"""Files of a sample cache: index, fixed-size records, lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.errors import user_errors
from kmine.io.files import lock, open_lock
from kmine.io.json_file import parse_json, read_regular
from kmine.types import Skipped

FORMAT = 1
MAX_INDEX = 2**30
"""Increase it when records, hashes or the index change their meaning."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One readable sample of a cache."""

    sample_id: str
    row: int
    """Position of its records."""
    height: int
    """Height of the native image in pixels."""
    width: int
    image_hash: int
    """Unsigned 64-bit perceptual hash of the native image."""
    image_crc: int
    """CRC-32 of its image record."""


@dataclass(frozen=True)
class Index:
    """Everything in a cache besides pixels."""

    entries: dict[str, Entry]
    skipped: tuple[Skipped, ...]


def write_index(folder: Path, signature: dict[str, object], index: Index) -> None:
    """Write `index.json`: a line with the SHA-256 of the body, then the body."""
    entries, skipped = (list(map(astuple, items)) for items in (index.entries.values(), index.skipped))
    body = json.dumps({"format": FORMAT, **signature, "entries": entries, "skipped": skipped}).encode()
    (folder / "index.json").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_index(folder: Path, signature: dict[str, object], sizes: dict[str, int]) -> Index | str:
    """Index of a complete cache with this signature and these bytes of each record file, or the problem with it."""
    try:
        data = read_regular(folder / "index.json", "an index", "remove the folder", MAX_INDEX)
        sha256, _, body = data.partition(b"\n")
        file_sizes = {name: (folder / name).stat().st_size for name in sizes}
    except (OSError, UserError) as error:
        name = Path(error.filename).name if isinstance(error, OSError) else "index.json"
        return f"{name} is missing or unreadable"
    if hashlib.sha256(body).hexdigest().encode() != sha256:
        return "index.json is damaged"
    for name, size in sizes.items():
        if file_sizes[name] != size:
            return f"{name} has {file_sizes[name]} bytes instead of {size}"
    try:
        content = parse_json(body, "index.json", "an index", "")
        if {key: content.get(key) for key in ("format", *signature)} != {"format": FORMAT, **signature}:
            return "it was written for other data or by another version"
        entries = (Entry(*row) for row in content["entries"])
        return Index({entry.sample_id: entry for entry in entries}, tuple(Skipped(*row) for row in content["skipped"]))
    except (UserError, AttributeError, KeyError, TypeError):
        return "index.json has another format"


def read_record(path: Path, row: int, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Writable record number `row` of a file of uint8 records; None where the file is missing or too short."""
    # Not a memory map, whose touched pages would count as memory of this process.
    record = np.empty(shape, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(row * record.nbytes)
            complete = file.readinto(record.data) == record.nbytes
    except FileNotFoundError:
        return None
    return record if complete else None


def write_record(path: Path, row: int, record: NDArray[np.uint8]) -> None:
    """Overwrite record number `row` in place; raises `OSError`."""
    with path.open("r+b") as file:
        file.seek(row * record.nbytes)
        file.write(record.data)


def allocate(path: Path, size: int, *, reserve: bool) -> None:
    """Create a file of zeros; `reserve` allocates disk space at once, so that a full disk is noticed early."""
    with path.open("wb") as file:
        file.truncate(size)
        if reserve and size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for other processes and threads; the file remains."""
    with open_lock(path) as file:
        lock(file, wait=True)
        yield


def cache_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn an `OSError` into a `UserError` with the cure; commands on finished runs have the second one only."""
    cure = "name another folder: --data.cache_dir of loop, check and sweep, else KMINE_CACHE in the environment"
    return user_errors(folder, cure=cure, otherwise="cannot store decoded images")
