"""Cache of images and masks at the input size of the local model, on disk, shared by runs and processes.

A cache is a folder named after the fingerprint of the source and the size S. `images.u8` holds one (S, S, 3) record per
sample, `masks.u8` one (S, S) record, filled at the first request: masks that are not requested are never opened.
Records are read one at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Iterable
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.cache.build import open_index
from kmine.data.cache.files import cache_errors, read_record, write_record
from kmine.data.perceptual_hash import BLANK
from kmine.data.quality.image_stats import FLAT, compute_stats
from kmine.data.resize import Resizer
from kmine.data.source import SKIP_HINT, OnError, Source
from kmine.errors import SampleError, UserError
from kmine.io.files import cache_root
from kmine.io.threads import thread_pool
from kmine.types import SampleRef, Skipped

MASK_READER = 2
"""Increase it when readers of masks accept or read others than before: stored masks are decoded once again."""


class SampleCache:
    """Images and masks of a source, resized from the cache or native from the source.

    Safe to use from threads, after a fork and, if the source is, after pickling: no file stays open.

    Args:
        source: the data set, with or without files.
        size: S, side of the square in pixels, or how images are resized; each way has its own cache.
        cache_dir: folder of all caches, see `kmine.io.files.cache_root`.
        on_error: "stop" raises for a damaged image, "skip" lists it in `skipped`. In both cases the cache is kept, so
            that images are not decoded again.

    Raises:
        SampleError: for the first damaged image, if `on_error` is "stop".
        UserError: when nothing can be stored in the cache folder, or no image is left.
    """

    def __init__(
        self, source: Source, size: int | Resizer, cache_dir: Path | str | None = None, on_error: OnError = "stop"
    ) -> None:
        self.source, self.on_error = source, on_error
        self.resizer = size if isinstance(size, Resizer) else Resizer(size)
        self.size, letterbox, by_area = self.resizer
        refs, fingerprint = source.refs(), source.fingerprint()
        ways = "-letterbox" * letterbox + "-area" * by_area
        self.folder = cache_root(cache_dir) / f"{source.name}-{fingerprint[:16]}-{self.size}{ways}"
        signature = {"fingerprint": fingerprint, "size": self.size} | ({"letterbox": True} if letterbox else {})
        index = open_index(self.folder, signature, source, refs)
        self._entries = index.entries
        self._refuse_damaged(index.skipped)
        self.skipped = index.skipped
        """Images that could not be read, in addition to `source.skipped`."""
        self._refs = {ref.sample_id: ref for ref in refs if ref.sample_id in self._entries}

    @property
    def refs(self) -> tuple[SampleRef, ...]:
        """Samples with a readable image, sorted by id, with the groups of the source."""
        return tuple(self._refs.values())

    @cached_property
    def hashes(self) -> dict[str, int]:
        """Unsigned 64-bit perceptual hash by sample id, without blank images, whose hashes are all alike.

        Only images whose hash is that of equal values are looked at, at training size.
        """
        hashes = {sample_id: entry.image_hash for sample_id, entry in self._entries.items()}
        return {i: image_hash for i, image_hash in hashes.items() if image_hash not in BLANK or not self._is_flat(i)}

    def _is_flat(self, sample_id: str) -> bool:
        planes = self.resizer.content(np.moveaxis(self.image_resized(sample_id), -1, 0), *self.native_shape(sample_id))
        return compute_stats(sample_id, np.moveaxis(planes, 0, -1), None).contrast < FLAT

    def ref(self, sample_id: str) -> SampleRef:
        """Index entry of a sample."""
        return self._refs[sample_id]

    def native_shape(self, sample_id: str) -> tuple[int, int]:
        """(H, W) of the image."""
        entry = self._entries[sample_id]
        return entry.height, entry.width

    def image_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S, 3) RGB, [0, 255], writable. A damaged record is decoded again."""
        entry = self._entries[sample_id]
        record = read_record(self.folder / "images.u8", entry.row, (self.size, self.size, 3))
        if record is None or zlib.crc32(record) != entry.image_crc:
            record = self.resizer.image(self.source.image(sample_id))
            with cache_errors(self.folder.parent):
                write_record(self.folder / "images.u8", entry.row, record)
        return record

    def mask_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S) class ids, writable; decoded once. Raises `SampleError`."""
        row = self._entries[sample_id].row
        stored = read_record(self.folder / "masks.u8", row, (self.size, self.size))
        flag = read_record(self.folder / "masks.flags", row, (4,))
        if stored is not None and flag is not None and np.array_equal(flag, _flag(stored)):
            return stored
        mask = self.resizer.mask(self.source.mask(sample_id))
        with cache_errors(self.folder.parent):
            write_record(self.folder / "masks.u8", row, mask)
            # Written last, so that a partial record is not valid.
            write_record(self.folder / "masks.flags", row, _flag(mask))
        return mask

    def image_native(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]."""
        if self.native_shape(sample_id) == (self.size, self.size):
            return self.image_resized(sample_id)
        return self.source.image(sample_id)

    def mask_native(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids. Raises `SampleError`."""
        if self.native_shape(sample_id) == (self.size, self.size):
            return self.mask_resized(sample_id)
        return self.source.mask(sample_id)

    def content_fingerprints(self, with_masks: Iterable[str]) -> dict[str, str]:
        """SHA-256 (hex) of the content of the data, independent of file times and folders.

        `images`: index entry and record of every sample. `masks`: records of the samples `with_masks`.
        """
        entries = sorted(self._entries.items())
        images = [[*astuple(self._refs[i]), entry.height, entry.width, entry.image_crc] for i, entry in entries]
        parts = {"images": images, "masks": [[i, self._mask_crc(i)] for i in sorted(with_masks)]}
        content = {name: json.dumps([self.size, rows]).encode() for name, rows in parts.items()}
        return {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}

    def checksums(self, with_masks: Collection[str]) -> dict[str, tuple[int, int | None]]:
        """CRC-32 of the image of every sample and of the masks of the samples `with_masks`, at training size, by id."""
        ids = sorted(self._entries)
        return {i: (self._entries[i].image_crc, self._mask_crc(i) if i in with_masks else None) for i in ids}

    def _mask_crc(self, sample_id: str) -> int | None:
        """CRC-32 of the record of a mask; None for a damaged mask or an unknown sample."""
        try:
            return zlib.crc32(self.mask_resized(sample_id)) if sample_id in self._entries else None
        except SampleError:
            return None

    def decode_masks(self, sample_ids: Iterable[str]) -> tuple[Skipped, ...]:
        """Decode masks with several threads; returns the damaged ones ("stop": raises for the first)."""

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
    """(4,) flag of a written mask record: its CRC-32, begun with `MASK_READER`, never zero."""
    return np.frombuffer((zlib.crc32(mask, MASK_READER) or 1).to_bytes(4, "little"), np.uint8)
