"""Embeddings of images on disk, shared by rounds, seeds, label fractions, commands and processes.

It never stops a run: what cannot be read is made anew, what cannot be written is not kept, and either is said once.

One file an embedding, `K0/KEY.emb` with the first two digits of its key as folder: a line with the SHA-256 of all that
follows, a line of JSON (key, dtype, shape), the numbers. Files are written under another name and renamed, so readers
and writers of several processes never meet a half-written one; where two make the same embedding, the later replaces
the equal earlier one. The time of last use is the file's modification time; the least recently used go first.
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

SUFFIX = ".emb"
UNFINISHED = ".tmp"
DTYPES = ("float16", "float32")
KEEP = 0.9
"""Share of the budget that clearing leaves in use, so that not every new file has to clear again."""
RECOUNT = 0.05
"""After writing this share of the budget, the folder is counted again: other processes write there, too."""
ABANDONED_S = 3600
"""Unfinished files of this age were left by a process that was killed."""


def default_folder() -> Path:
    """`embeddings` in $KMINE_CACHE, else in ~/.cache/kmine."""
    return cache_root() / "embeddings"


class EmbeddingCache:
    """Arrays by key within a budget of bytes. Nothing is touched on disk before the first `get` or `put`."""

    def __init__(self, folder: Path, max_bytes: int, log: Callable[[str], None]) -> None:
        """A cache in `folder`, which is made when it is needed.

        Args:
            folder: of this cache alone.
            max_bytes: what its files may take together; several processes may exceed it by some 5 % each.
            log: is told, once for each kind of trouble, in one sentence.
        """
        self.folder = folder
        self._max_bytes = max_bytes
        self._log = log
        self._logged: set[str] = set()
        self._writable = True
        self._used: int | None = None
        """Bytes in the folder at the last count and those written since; None before the first count."""
        self._since_count = 0

    def get(self, key: str) -> NDArray[np.floating] | None:
        """The array kept under a key, read-only; None where there is none, or none that is whole.

        Args:
            key: hexadecimal digits, as `put` was given.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._log_once("unreadable", f"cannot be read ({error.strerror or error}); images are encoded anew")
            return None
        features = unpacked(key, content)
        if features is None:
            self._log_once("damaged", f"{path.name} is damaged or not one of kmine's; made anew, as is any other such")
            return None
        # A cache that may only be read still serves; it merely loses count of what was used last.
        with contextlib.suppress(OSError):
            os.utime(path)
        return features

    def put(self, key: str, features: NDArray[np.floating]) -> None:
        """Keeps a float16 or float32 array, where there is room; anything kept under that key is replaced."""
        if not self._writable:
            return
        content = packed(key, features)
        if len(content) > self._max_bytes:
            return
        path = self._path(key)
        temp = path.with_name(f".{key}.{os.getpid()}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            try:
                # No fsync: a file that a power failure tore is told by its checksum.
                temp.write_bytes(content)
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)
        except OSError as error:
            self._writable = False
            self._log_once(
                "unwritable",
                f"cannot be written ({error.strerror or error}); the run goes on without keeping embeddings: free some "
                "space, or name another folder with --segmenter.cache_dir",
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _log_once(self, kind: str, problem: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            self._log(f"embedding cache {self.folder}: {problem}")

    def _make_room(self, size: int) -> None:
        """Counts the folder where that is due, and clears it where `size` more bytes would exceed the budget."""
        if self._used is None or self._used + size > self._max_bytes or self._since_count > RECOUNT * self._max_bytes:
            self._used, self._since_count = self._clear(size), 0
        self._used += size
        self._since_count += size

    def _clear(self, size: int) -> int:
        """Removes the least recently used files if `size` more bytes exceed the budget; the bytes that remain."""
        files = sorted(_files(self.folder))
        used = sum(file_size for _, file_size, _ in files)
        if used + size <= self._max_bytes:
            return used
        for _, file_size, path in files:
            if used + size <= max(KEEP * self._max_bytes, size):
                break
            # Another process may have removed it meanwhile: gone is gone.
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            used -= file_size
        return used


def packed(key: str, features: NDArray[np.floating]) -> bytes:
    """The bytes of a file: checksum, header, numbers."""
    header = {"key": key, "dtype": str(features.dtype), "shape": features.shape}
    rest = json.dumps(header).encode() + b"\n" + np.ascontiguousarray(features).tobytes()
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpacked(key: str, content: bytes) -> NDArray[np.floating] | None:
    """What `packed` was given, read-only; None for damaged bytes or those of another key."""
    digest, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    line, _, numbers = rest.partition(b"\n")
    try:
        header = json.loads(line)
        if header["key"] != key or header["dtype"] not in DTYPES:
            return None
        return np.frombuffer(numbers, header["dtype"]).reshape(header["shape"])
    except (ValueError, KeyError, TypeError):  # whole, but written by something else
        return None


def _files(folder: Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every embedding; on the way, abandoned unfinished files are removed."""
    for subfolder in _entries(folder):
        if not subfolder.is_dir(follow_symlinks=False):
            continue
        for entry in _entries(Path(subfolder.path)):
            # Other processes clear, too: what vanishes between listing and asking is not there.
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
