"""Access to some samples of a data set, with or without their masks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.data.cache.sample_cache import SampleCache
from kmine.data.resize import to_frame
from kmine.errors import UserError, WithheldMaskError
from kmine.io.files import read_png
from kmine.types import IGNORE_INDEX, SLICE_ID, Sample

MaskReader = Callable[[str], NDArray[np.uint8]]
"""From a sample id to its (H, W) mask in the native frame: class ids, 255 is ignored."""


MAX_PACKED = 2**28
"""Bytes of compressed masks at training size that a pool keeps: some 100,000 pseudo masks."""


@dataclass(frozen=True)
class UnreadSample:
    """A sample without mask whose image is decoded at its first request."""

    sample_id: str
    image_label: int | None
    size: tuple[int, int]
    """(H, W)."""
    data_fingerprint: str
    """Of the data set's files."""
    cache: SampleCache

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]. Raises `SampleError`."""
        return self.cache.image_native(self.sample_id)


def read_file(path: Path, sample_id: str) -> NDArray[np.uint8]:
    """With `path` bound a `MaskReader` of a PNG file; other than a lambda it can be sent to another process."""
    return read_png(path)


def spaced_images(pools: Sequence[Pool], count: int) -> NDArray[np.uint8]:
    """(N, S, S, 3) RGB: at most `count` images of all pools together, evenly spaced in the order of their ids."""
    by_id = {sample_id: pool for pool in pools for sample_id in pool.ids}
    ids, number = sorted(by_id), min(count, len(by_id))
    chosen = [ids[n * len(ids) // number] for n in range(number)]
    return np.stack([by_id[sample_id].image_resized(sample_id) for sample_id in chosen])


class Pool:
    """Ordered samples of a cache, with true, withheld or other masks.

    Args:
        cache: images and true masks.
        ids: the samples, in order.
        groups: group id by sample id.
        masks: "withheld", "true", or a reader of other masks, such as pseudo masks.
        weights: weight of a mask in training, [0, 1], by sample id; default 1.
        empty: samples with masks known to be empty, which training limits in number.
        corrected: readers of corrected masks by sample id; take precedence over `masks`.

    Raises:
        UserError: when the cache lacks one of the samples.
        ValueError: for a weight outside [0, 1].
    """

    def __init__(
        self,
        cache: SampleCache,
        ids: Sequence[str],
        groups: Mapping[str, str],
        masks: Literal["withheld", "true"] | MaskReader = "withheld",
        *,
        weights: Mapping[str, float] | None = None,
        empty: Collection[str] = (),
        corrected: Mapping[str, MaskReader] | None = None,
    ) -> None:
        cached_ids = {ref.sample_id for ref in cache.refs}
        missing = [sample_id for sample_id in ids if sample_id not in cached_ids]
        if missing:
            raise UserError(
                f"data: expected {len(ids)} samples of the split, {len(missing)} are missing in the data set, such as "
                f"{missing[0]}; restore them or start a new run folder with --out"
            )
        self.ids, self._cache, self._masks = tuple(ids), cache, masks
        self._groups = {sample_id: groups[sample_id] for sample_id in ids}
        self.weights = {i: float(weights[i]) for i in self.ids if i in weights} if weights else {}
        """Weight by sample id, for samples with an explicit weight."""
        self.empty = frozenset(empty).intersection(self.ids)
        """Samples with masks known to be empty."""
        self._corrected = {i: read for i, read in (corrected or {}).items() if i in self._groups}
        self._packed: dict[str, bytes] = {}
        self._packed_bytes = 0
        for sample_id, weight in self.weights.items():
            if not 0 <= weight <= 1:
                raise ValueError(f"{sample_id}: expected a weight in [0, 1], got {weight}")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._groups

    def with_masks(
        self,
        ids: Sequence[str],
        masks: MaskReader,
        *,
        weights: Mapping[str, float] | None = None,
        empty: Collection[str] = (),
    ) -> Pool:
        """Pool of the samples `ids` of this pool with the masks of another reader, such as pseudo masks.

        `weights` and `empty` as in the class. Raises `ValueError` for a weight outside [0, 1].
        """
        return Pool(self._cache, ids, self._groups, masks, weights=weights, empty=empty)

    def subset(self, ids: Sequence[str]) -> Pool:
        """Pool of the samples `ids` of this pool, with the same masks and weights."""
        options = {"weights": self.weights, "empty": self.empty, "corrected": self._corrected}
        return Pool(self._cache, ids, self._groups, self._masks, **options)

    def supersampled(self, factor: int) -> Pool:
        """The same samples, resized to `factor` times the side S, from a cache of their own."""
        if factor == 1:
            return self
        cache = self._cache
        larger = cache.resizer._replace(size=cache.size * factor)
        same = SampleCache(cache.source, larger, cache.folder.parent, cache.on_error)
        options = {"weights": self.weights, "empty": self.empty, "corrected": self._corrected}
        return Pool(same, self.ids, self._groups, self._masks, **options)

    def weight(self, sample_id: str) -> float:
        """Weight of the mask of a sample in training, [0, 1]."""
        return self.weights.get(self._checked_id(sample_id), 1.0)

    def group_of(self, sample_id: str) -> str:
        """Patient, volume or near-duplicate group of a sample."""
        return self._groups[sample_id]

    def neighbours(self, sample_id: str) -> tuple[str, ...]:
        """The slices before and after a slice in its volume, as far as the pool has them; none for other images.

        A volume is of one group: single images that are merely named like slices may lie in several folds. The next
        slice is as far away as the two of the pool's slices of the volume that are closest to each other.
        """
        return self._neighbours.get(sample_id, ())

    def volume_of(self, sample_id: str) -> tuple[str, ...]:
        """All slices of a slice's volume that the pool has, in order; none for other images and for a single slice."""
        match = SLICE_ID.fullmatch(sample_id)
        slices = self._volumes.get((match[1], self._groups.get(sample_id, "")), {}) if match else {}
        return tuple(slices[n] for n in sorted(slices)) if len(slices) > 1 else ()

    @cached_property
    def _volumes(self) -> dict[tuple[str, str], dict[int, str]]:
        """Sample ids by number of the slice, by volume and group."""
        volumes: dict[tuple[str, str], dict[int, str]] = {}
        for sample_id in self.ids:
            if match := SLICE_ID.fullmatch(sample_id):
                volumes.setdefault((match[1], self._groups[sample_id]), {})[int(match[2])] = sample_id
        return volumes

    @cached_property
    def _neighbours(self) -> dict[str, tuple[str, ...]]:
        found = {}
        for slices in self._volumes.values():
            numbers = sorted(slices)
            gap = min((b - a for a, b in pairwise(numbers)), default=0)
            for number in numbers if gap else ():
                found[slices[number]] = tuple(slices[n] for n in (number - gap, number + gap) if n in slices)
        return found

    def image_label(self, sample_id: str) -> int | None:
        """Image-level label (0: lesion-free) from the index; None where unknown. Reads no mask."""
        return self._cache.ref(self._checked_id(sample_id)).image_label

    def is_clean(self, sample_id: str) -> bool:
        """Whether the resized mask shows nothing; raises as `mask_resized`."""
        mask = self.mask_resized(sample_id)
        return not ((mask > 0) & (mask != IGNORE_INDEX)).any()

    @property
    def in_mm(self) -> bool:
        """Whether the spacing of every sample is known, so that distances in mm can be averaged."""
        return all(self._cache.ref(sample_id).spacing is not None for sample_id in self.ids)

    def native_shape(self, sample_id: str) -> tuple[int, int]:
        """(H, W) of the image."""
        return self._cache.native_shape(sample_id)

    def image_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S, 3) RGB, [0, 255]."""
        return self._cache.image_resized(self._checked_id(sample_id))

    def mask_resized(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S) class ids or 255. Raises `WithheldMaskError` where withheld, `SampleError` for a bad file.

        Masks of a reader are read and resized once, and kept compressed up to `MAX_PACKED`.
        """
        read = self._corrected.get(sample_id, self._masks)
        if read == "withheld":
            raise WithheldMaskError(f"the mask of {sample_id} was requested, but this pool withholds masks")
        if read == "true":
            return self._cache.mask_resized(self._checked_id(sample_id))
        if sample_id in self._packed:
            packed = np.frombuffer(bytearray(zlib.decompress(self._packed[sample_id])), np.uint8)
            return packed.reshape((self._cache.size,) * 2)
        mask = self._cache.resizer.mask(self._read_mask(sample_id))
        if self._packed_bytes < MAX_PACKED:
            self._packed[sample_id] = packed = zlib.compress(mask, 1)
            self._packed_bytes += len(packed)
        return mask

    def mask_native(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids or 255. Raises as `mask_resized`."""
        if self._corrected.get(sample_id, self._masks) == "withheld":
            raise WithheldMaskError(f"the mask of {sample_id} was requested, but this pool withholds masks")
        return self._read_mask(sample_id)

    def spacing(self, sample_id: str) -> tuple[float, float] | None:
        """Millimetres per pixel (row, column), if known."""
        return self._cache.ref(self._checked_id(sample_id)).spacing

    def blank_mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S): 0 where the resized image is, 255 around a letterboxed one."""
        shape = self.native_shape(sample_id)
        blank = np.full((self._cache.size,) * 2, IGNORE_INDEX, np.uint8)
        self._cache.resizer.content(blank, *shape)[:] = 0
        return blank

    def in_frame(self, planes: NDArray[np.float32], sample_id: str) -> NDArray[np.float32]:
        """(C, S, S) of the resized image -> (C, H, W) in the native frame, bilinear."""
        shape = self.native_shape(sample_id)
        return to_frame(self._cache.resizer.content(planes, *shape), *shape)

    def sample(self, sample_id: str) -> Sample:
        """Sample in the native frame; `mask` is None where masks are withheld. Raises `SampleError`."""
        ref = self._cache.ref(self._checked_id(sample_id))
        return Sample(
            sample_id=sample_id,
            group_id=self._groups[sample_id],
            image=self._cache.image_native(sample_id),
            mask=None if self._masks == "withheld" else self._read_mask(sample_id),
            image_label=ref.image_label,
            spacing=ref.spacing,
        )

    def unread(self, sample_id: str) -> UnreadSample:
        """`sample` without its mask, whose image is decoded when it is requested."""
        label, shape = self.image_label(sample_id), self.native_shape(sample_id)
        return UnreadSample(sample_id, label, shape, self._cache.source.fingerprint(), self._cache)

    def _checked_id(self, sample_id: str) -> str:
        if sample_id not in self._groups:
            raise KeyError(f"{sample_id} is not in this pool")
        return sample_id

    def _read_mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) mask: corrected, else from a reader, else true."""
        read = self._corrected.get(sample_id, self._masks)
        if not callable(read):
            return self._cache.mask_native(self._checked_id(sample_id))
        mask = read(self._checked_id(sample_id))
        if mask.shape != self.native_shape(sample_id):
            raise ValueError(f"{sample_id}: expected a mask of {self.native_shape(sample_id)}, got {mask.shape}")
        return mask
