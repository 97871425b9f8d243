"""Every image decoded once, at the size the local model sees, on disk and shared by runs and processes.

A cache is a folder named after the source's fingerprint and the size S. `images.u8` holds one (S, S, 3) record a
sample, `masks.u8` one (S, S) record, filled at first request: a mask that nobody asks for is never opened.
Records are read one at a time and not memory-mapped for long, so that memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.data.cache.build import open_index
from kmine.data.cache.files import (
    cache_errors,
    read_record,
    write_record,
)
from kmine.data.resize import resize_image, resize_mask
from kmine.data.source import Source
from kmine.errors import SampleError, UserError
from kmine.io.files import cache_root
from kmine.io.threads import thread_pool
from kmine.types import SampleRef, Skipped

SKIP_HINT = "pass --data.on_error skip to list and leave out such files"


class SampleCache:
    """Small images and masks of a source; native ones come from the source itself.

    Safe to use from threads, after a fork and, if the source is, pickled: no file stays open.

    Args:
        source: the data set.
        size: S, side of the square in pixels; images are squashed to it, not cropped.
        cache_dir: folder of all caches; None is $KMINE_CACHE, else ~/.cache/kmine.
        on_error: "stop" raises when any image is damaged, "skip" lists it in `skipped`; either way the cache
            is kept, so that a second try does not decode again.

    Raises:
        SampleError: for the first damaged image, if `on_error` is "stop".
        UserError: when nothing can be stored in the cache folder, or no image is left.
    """

    def __init__(
        self, source: Source, size: int, cache_dir: Path | None = None, on_error: Literal["stop", "skip"] = "stop"
    ) -> None:
        self.source = source
        self.size = size
        self.on_error = on_error
        refs = source.refs()
        fingerprint = source.fingerprint()
        self.folder = cache_root(cache_dir) / f"{source.name}-{fingerprint[:16]}-{size}"
        index = open_index(self.folder, {"fingerprint": fingerprint, "size": size}, source, refs)
        self._entries = index.entries
        self._refuse_damaged(index.skipped)
        self.skipped = index.skipped
        """Images that could not be read; `source.skipped` is apart."""
        self._refs = {ref.sample_id: ref for ref in refs if ref.sample_id in self._entries}

    @property
    def refs(self) -> tuple[SampleRef, ...]:
        """Samples whose image could be read, sorted by id; duplicates are not merged yet."""
        return tuple(self._refs.values())

    @property
    def hashes(self) -> dict[str, int]:
        """Unsigned 64-bit perceptual hash by sample id."""
        return {sample_id: entry.image_hash for sample_id, entry in self._entries.items()}

    def ref(self, sample_id: str) -> SampleRef:
        """What the index knows of one sample."""
        return self._refs[sample_id]

    def native_shape(self, sample_id: str) -> tuple[int, int]:
        """(H, W) of the image in its own frame."""
        entry = self._entries[sample_id]
        return entry.height, entry.width

    def image_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S, 3) RGB, [0, 255], writable. A damaged record is decoded anew."""
        entry = self._entries[sample_id]
        record = read_record(self.folder / "images.u8", entry.row, (self.size, self.size, 3))
        if record is None or zlib.crc32(record) != entry.image_crc:
            record = resize_image(self.source.image(sample_id), self.size)
            with cache_errors(self.folder.parent):
                write_record(self.folder / "images.u8", entry.row, record)
        return record

    def mask_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S) class ids, writable; decoded at the first request, ever. Raises `SampleError`."""
        row = self._entries[sample_id].row
        stored = read_record(self.folder / "masks.u8", row, (self.size, self.size))
        flag = read_record(self.folder / "masks.flags", row, (4,))
        if stored is not None and flag is not None and np.array_equal(flag, _flag(stored)):
            return stored
        mask = resize_mask(self.source.mask(sample_id), self.size)
        with cache_errors(self.folder.parent):
            write_record(self.folder / "masks.u8", row, mask)
            # Only now, so that nobody trusts half a record.
            write_record(self.folder / "masks.flags", row, _flag(mask))
        return mask

    def image_native(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255], in its own frame."""
        if self.native_shape(sample_id) == (self.size, self.size):
            return self.image_resized(sample_id)
        return self.source.image(sample_id)

    def mask_native(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids, in the image's own frame. Raises `SampleError`."""
        if self.native_shape(sample_id) == (self.size, self.size):
            return self.mask_resized(sample_id)
        return self.source.mask(sample_id)

    def content_fingerprints(self, with_masks: Iterable[str]) -> dict[str, str]:
        """What the data are, whenever and wherever their files were copied to: SHA-256 (hex) of two parts.

        `images`: what is known of every sample, and its record. `masks`: the records of those in `with_masks`.
        """
        images = [
            [*astuple(self._refs[i]), entry.height, entry.width, entry.image_crc]
            for i, entry in sorted(self._entries.items())
        ]
        masks = [[i, self._mask_crc(i)] for i in sorted(with_masks)]
        parts = {"images": images, "masks": masks}
        return {
            name: hashlib.sha256(json.dumps([self.size, rows]).encode()).hexdigest() for name, rows in parts.items()
        }

    def _mask_crc(self, sample_id: str) -> int | None:
        """CRC-32 of a mask's record; None for a damaged mask, and for a sample that is not there."""
        try:
            return zlib.crc32(self.mask_resized(sample_id)) if sample_id in self._entries else None
        except SampleError:
            return None

    def decode_masks(self, sample_ids: Iterable[str]) -> tuple[Skipped, ...]:
        """Decode these masks now, in parallel, and return the damaged ones ("stop": raise the first)."""

        def decode(sample_id: str) -> Skipped | None:
            try:
                self.mask_resized(sample_id)
            except SampleError as error:
                return Skipped(sample_id, error.path, error.problem)
            return None

        with thread_pool() as threads:
            damaged = tuple(skipped for skipped in threads.map(decode, sample_ids) if skipped)
        self._refuse_damaged(damaged)
        return damaged

    def _refuse_damaged(self, damaged: tuple[Skipped, ...]) -> None:
        if damaged and self.on_error == "stop":
            more = f" ({len(damaged) - 1} more files are damaged)" if len(damaged) > 1 else ""
            raise SampleError(damaged[0].path, f"{damaged[0].problem}{more}; or {SKIP_HINT}")
        if not self._entries:
            raise UserError(f"data: expected images, got none that can be read ({len(damaged)} are damaged)")


def _flag(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(4,) presence flag of a mask record: its CRC-32, never zero."""
    return np.frombuffer((zlib.crc32(mask) or 1).to_bytes(4, "little"), np.uint8)
