"""Embeddings of images on disk, shared by runs and processes: one file each, `K0/KEY.emb`, K0 the first two digits.

A file appears whole, by renaming. Its modification time is its last use; the least recently used are removed first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.io.files import cache_root
from kmine.io.json_file import parse_json

SUFFIX = ".emb"
UNFINISHED = ".tmp"
DTYPES = ("float16", "float32")
KEEP = 0.9
"""Share of the budget left in use by clearing, so that not every new file clears again."""
RECOUNT = 0.05
"""The folder is counted again after writing this share of the budget: other processes write there, too."""
ABANDONED_S = 3600
"""Age of unfinished files that a killed process left."""


def default_folder() -> Path:
    """`embeddings` in $KMINE_CACHE, else in ~/.cache/kmine."""
    return cache_root() / "embeddings"


class EmbeddingCache:
    """Arrays by key. Failures never stop a run: unreadable arrays are missing, unwritable ones are not stored.

    Args:
        folder: for this cache only; not touched before the first `get` or `put`, which creates it.
        max_bytes: of all its files; several processes may exceed it by some 5 % each.
        log: gets one line per kind of failure.
    """

    def __init__(self, folder: Path, max_bytes: int, log: Callable[[str], None]) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._log = log
        self._logged: set[str] = set()
        self._writable = True
        self._used: int | None = None
        """Bytes in the folder at the last count plus bytes written since; None before the first count."""
        self._since_count = 0

    def get(self, key: str) -> NDArray[np.floating] | None:
        """The array of a key (hexadecimal digits), read-only; None if it is missing or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._log_once("unreadable", f"cannot be read ({error.strerror or error}); images are encoded again")
            return None
        features = unpacked(key, content)
        if features is None:
            self._log_once("damaged", f"{path.name} is damaged; such embeddings are computed again")
            return None
        # A read-only cache still works, without the times of last use.
        with contextlib.suppress(OSError):
            os.utime(path)
        return features

    def put(self, key: str, features: NDArray[np.floating]) -> None:
        """Store a float16 or float32 array if it fits the budget; an array of the same key is replaced."""
        if not self._writable or len(content := packed(key, features)) > self._max_bytes:
            return
        path = self._path(key)
        temp = path.with_name(f".{key}.{os.getpid()}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            try:
                # No fsync: the checksum detects a file damaged by a power failure.
                temp.write_bytes(content)
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)
        except OSError as error:
            self._writable = False
            problem = f"cannot be written ({error.strerror or error}); embeddings are not stored from here on"
            cure = "free some space, or name another folder with --segmenter.cache_dir"
            self._log_once("unwritable", f"{problem}: {cure}")

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _log_once(self, kind: str, problem: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            self._log(f"embedding cache {self.folder}: {problem}")

    def _make_room(self, size: int) -> None:
        """Count the folder when due, and clear it if `size` more bytes exceed the budget."""
        if self._used is None or self._used + size > self._max_bytes or self._since_count > RECOUNT * self._max_bytes:
            self._used, self._since_count = self._clear(size), 0
        self._used += size
        self._since_count += size

    def _clear(self, size: int) -> int:
        """Remove least recently used files if `size` more bytes exceed the budget. Returns the bytes that remain."""
        files = sorted(_files(self.folder))
        used = sum(file_size for _, file_size, _ in files)
        if used + size <= self._max_bytes:
            return used
        for _, file_size, path in files:
            if used + size <= max(KEEP * self._max_bytes, size):
                break
            # Another process may have removed it.
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            used -= file_size
        return used


def packed(key: str, features: NDArray[np.floating]) -> bytes:
    """The bytes of a file: a line with the SHA-256 of the rest, a line of JSON (key, dtype, shape), the numbers."""
    header = {"key": key, "dtype": str(features.dtype), "shape": features.shape}
    rest = json.dumps(header).encode() + b"\n" + np.ascontiguousarray(features).tobytes()
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpacked(key: str, content: bytes) -> NDArray[np.floating] | None:
    """The inverse of `packed`, read-only; None for damaged bytes or those of another key."""
    digest, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    line, _, numbers = rest.partition(b"\n")
    try:
        header = parse_json(line, "header", "an object", "")
        if header["key"] != key or header["dtype"] not in DTYPES:
            return None
        return np.frombuffer(numbers, header["dtype"]).reshape(header["shape"])
    except (ValueError, KeyError, TypeError, OverflowError):  # intact, but of another format
        return None


def _files(folder: Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every embedding; abandoned unfinished files are removed."""
    for subfolder in _entries(folder):
        if not subfolder.is_dir(follow_symlinks=False):
            continue
        for entry in _entries(Path(subfolder.path)):
            # Other processes may remove files between listing and `stat`.
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX):
                    yield stat.st_mtime, stat.st_size, entry.path
                elif entry.name.endswith(UNFINISHED) and time.time() - stat.st_mtime > ABANDONED_S:
                    Path(entry.path).unlink()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
