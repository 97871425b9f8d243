"""Embeddings of images on disk, shared by runs and processes: one file each, `K0/KEY.emb`, K0 the first two digits.

A file appears whole, by renaming. Its modification time is its last use. Where the budget is reached, the least
recently used are removed first, but none that this process has used or reserved: each round needs the same images in
the same order, so that to remove one for another would leave no image found again (own choice).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kmine.io.files import cache_root
from kmine.io.json_file import parse_json
from kmine.segmenters.base import Embedding

SUFFIX = ".emb"
UNFINISHED = ".tmp"
DTYPES = ("float16", "float32")
KEEP = 0.9
"""Share of the budget left in use by clearing, so that not every new file clears again."""
RECOUNT = 0.05
"""The folder is counted again after writing this share of the budget: other processes write there, too."""
FREE_SHARE = 0.5
"""Share of the free disk space, and of what the cache holds there, that is the budget by default."""
CLOCK_S = 1.0
"""Times of files may lag behind the clock by as much."""
ABANDONED_S = 3600
"""Age of unfinished files that a killed process left."""


def default_folder() -> Path:
    """`embeddings` in $KMINE_CACHE, else in ~/.cache/kmine."""
    return cache_root() / "embeddings"


class KnownImage(Protocol):
    """An image of a data set's files, decoded when `image` is requested."""

    @property
    def sample_id(self) -> str:
        """Unique in the data set."""

    @property
    def data_fingerprint(self) -> str:
        """Of all files of the data set, as they are now."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]."""


@runtime_checkable
class CachingSegmenter(Protocol):
    """A `Segmenter` that keeps embeddings on disk; its `encode` takes a `KnownImage` in place of an array, too."""

    def stored(self, images: Sequence[KnownImage]) -> list[Embedding | None]:
        """The embeddings that are on disk, None for others; no image is decoded. May be called in any thread."""

    def reserve(self, images: Sequence[KnownImage]) -> str:
        """Keep the embeddings of these images as long as there is room; returns what will be kept, a sentence."""


class EmbeddingCache:
    """Arrays by key. Failures never stop a run: unreadable arrays are missing, unwritable ones are not stored.

    Args:
        folder: for this cache only; not touched before the first `get` or `put`, which creates it.
        max_bytes: of all its files; several processes may exceed it by some 5 % each. None: `FREE_SHARE`.
        log: gets one line per kind of failure.
    """

    def __init__(self, folder: Path, max_bytes: int | None, log: Callable[[str], None]) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._log = log
        self._logged: set[str] = set()
        self._writable = True
        self._used: int | None = None
        """Bytes in the folder at the last count plus bytes written since; None before the first count."""
        self._since_count = 0
        self._began = time.time() - CLOCK_S
        self._reserved: set[str] = set()

    @property
    def budget(self) -> int:
        """Bytes of all files together."""
        if self._max_bytes is None:
            used = sum(size for _, size, _ in _files(self.folder))
            place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
            self._max_bytes = int(FREE_SHARE * (used + shutil.disk_usage(place).free))
        return self._max_bytes

    def reserve(self, keys: Iterable[str]) -> list[int]:
        """Keep the arrays of these keys, which will be needed, where room is short; bytes of those that are there."""
        present = {key: self._path(key).stat().st_size for key in keys if self._path(key).is_file()}
        self._reserved.update(present)
        return list(present.values())

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
        """Store a float16 or float32 array if there is room for it; an array of the same key is replaced."""
        if not self._writable or len(content := packed(key, features)) > self.budget:
            return
        path = self._path(key)
        temp = path.with_name(f".{key}.{os.getpid()}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._make_room(len(content)):
                return
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

    def _make_room(self, size: int) -> bool:
        """Count the folder when due, and clear it if `size` more bytes exceed the budget; whether there is room."""
        over = self._used is not None and self._used + size > self.budget
        if self._used is None or over or self._since_count > RECOUNT * self.budget:
            self._used, self._since_count = self._clear(size), 0
        if self._used + size > self.budget:
            self._writable = False  # all that is left is in use
            return False
        self._used += size
        self._since_count += size
        return True

    def _clear(self, size: int) -> int:
        """Remove least recently used files if `size` more bytes exceed the budget. Returns the bytes that remain."""
        files = sorted(_files(self.folder))
        used = sum(file_size for _, file_size, _ in files)
        if used + size <= self.budget:
            return used
        for last_use, file_size, path in files:
            if used + size <= max(KEEP * self.budget, size) or last_use >= self._began:
                break
            if Path(path).stem in self._reserved:
                continue
            # Another process may have removed it.
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            used -= file_size
        return used


class KeyIndex:
    """Keys by sample id, in lines of JSON that processes append: a known image is neither decoded nor hashed.

    One file belongs to one encoder and one state of the data's files. Failures are those of a cache: a line that cannot
    be read or written is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError):
                    sample_id, key = json.loads(line)
                    self._keys[sample_id] = str(key)

    def get(self, sample_id: str) -> str | None:
        """The key of an image; None if it is unknown."""
        return self._keys.get(sample_id)

    def add(self, sample_id: str, key: str) -> None:
        """Remember the key of an image."""
        self._keys[sample_id] = key
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(b"\n" + json.dumps([sample_id, key]).encode())  # ends a line that was cut short


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
