"""Building a sample cache: once, by one process, with several threads."""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from pathlib import Path

from rich.console import Console
from rich.progress import track

from kmine.data.cache.files import Entry, Index, allocate, cache_errors, locked, read_index, write_index, write_record
from kmine.data.perceptual_hash import perceptual_hash
from kmine.data.resize import Resizer
from kmine.data.source import Source
from kmine.errors import SampleError
from kmine.io.threads import thread_pool
from kmine.types import SampleRef, Skipped

_log = logging.getLogger(__name__)


def open_index(folder: Path, signature: dict[str, object], source: Source, refs: tuple[SampleRef, ...]) -> Index:
    """Read the index of a cache, or build the cache, with a record per sample of `refs`, while other processes wait.

    `signature`: `fingerprint` of the source and `size` S; a cache with another signature is rebuilt. Raises `UserError`
    when nothing can be stored in `folder`.
    """
    size = int(str(signature["size"]))
    sizes = {"images.u8": len(refs) * size**2 * 3, "masks.u8": len(refs) * size**2, "masks.flags": len(refs) * 4}
    index = _read(folder, signature, sizes, source)
    if isinstance(index, Index):
        return index
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            index = _read(folder, signature, sizes, source)
            if isinstance(index, Index):
                return index
            if folder.exists():
                _log.warning("cache %s is rebuilt: %s", folder, index)
            return _build(folder, signature, sizes, source, refs)


def _read(folder: Path, signature: dict[str, object], sizes: dict[str, int], source: Source) -> Index | str:
    """Index of a valid cache, or the reason why it is invalid."""
    index = read_index(folder, signature, sizes)
    if isinstance(index, Index):
        # A file that became readable (permissions, a remounted disk) keeps its time, so the fingerprint is unchanged.
        now_readable = [skipped.path for skipped in index.skipped if _is_readable(source, skipped.sample_id)]
        return f"{now_readable[0]} can be read now" if now_readable else index
    return index


def _is_readable(source: Source, sample_id: str) -> bool:
    try:
        source.image(sample_id)
    except SampleError:
        return False
    return True


def _build(
    folder: Path, signature: dict[str, object], sizes: dict[str, int], source: Source, refs: tuple[SampleRef, ...]
) -> Index:
    """Decode all images into a temporary folder, then rename it, so that a cache is complete or absent."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    building.mkdir()
    resizer = Resizer(int(str(signature["size"])), "letterbox" in signature)
    try:
        for name, num_bytes in sizes.items():
            allocate(building / name, num_bytes, reserve=name == "images.u8")
        index = _decode_all(building / "images.u8", resizer, source, refs)
        write_index(building, signature, index)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return index


def _decode_all(images: Path, resizer: Resizer, source: Source, refs: tuple[SampleRef, ...]) -> Index:
    def decode(row: int) -> Entry | Skipped:
        sample_id = refs[row].sample_id
        try:
            image = source.image(sample_id)
        except SampleError as error:
            return Skipped(sample_id, error.path, error.problem)
        small = resizer.image(image)
        write_record(images, row, small)
        return Entry(sample_id, row, *image.shape[:2], perceptual_hash(image), zlib.crc32(small))

    console = Console(stderr=True)
    bar = {"console": console, "transient": True, "disable": not console.is_terminal}
    with thread_pool() as threads:
        done = list(track(threads.map(decode, range(len(refs))), "Decoding", len(refs), **bar))
    entries = {entry.sample_id: entry for entry in done if isinstance(entry, Entry)}
    return Index(entries, tuple(skipped for skipped in done if isinstance(skipped, Skipped)))
