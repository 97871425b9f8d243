"""A data set of arrays in memory, without files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from kmine.errors import SampleError
from kmine.types import SampleRef, Skipped


class MemorySource:
    """`kmine.data.source.Source` of arrays; records what is read, and raises `SampleError` for chosen samples.

    Args:
        images: (H, W, 3) uint8 by sample id.
        masks: (H, W) uint8 class ids; images without one are unlabeled.
        image_labels: image-level label by sample id.
        broken: ids of images that cannot be read.
        broken_masks: ids of masks that cannot be read.
    """

    name = "memory"
    class_names = ("background", "object")
    skipped: tuple[Skipped, ...] = ()

    def __init__(
        self,
        images: Mapping[str, np.ndarray],
        masks: Mapping[str, np.ndarray],
        *,
        image_labels: Mapping[str, int] | None = None,
        broken: Collection[str] = (),
        broken_masks: Collection[str] = (),
    ) -> None:
        self.images, self.masks, self.image_labels = dict(images), dict(masks), dict(image_labels or {})
        self.broken, self.broken_masks = broken, broken_masks
        self.reads: list[str] = []

    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(
            SampleRef(i, i, has_mask=i in self.masks, image_label=self.image_labels.get(i)) for i in sorted(self.images)
        )

    def image(self, sample_id: str) -> np.ndarray:
        self.reads.append(f"image {sample_id}")
        if sample_id in self.broken:
            raise SampleError(f"{sample_id}.jpg", "broken")
        return self.images[sample_id].copy()

    def mask(self, sample_id: str) -> np.ndarray:
        self.reads.append(f"mask {sample_id}")
        if sample_id in self.broken_masks:
            raise SampleError(f"{sample_id}.png", "broken mask")
        return self.masks[sample_id].copy()

    def fingerprint(self) -> str:
        sha256 = hashlib.sha256()
        for arrays in (self.images, self.masks):
            for sample_id, array in sorted(arrays.items()):
                sha256.update(f"{sample_id} {array.shape} ".encode() + array.tobytes())
        return sha256.hexdigest()

    def slice_location(self, sample_id: str) -> None:
        return None


def noise_source(count=5, height=20, **faults) -> MemorySource:
    """Images s0, s1, ... of (height + n, 30) pixels of noise; see `MemorySource` for `faults`."""
    shapes = {f"s{n}": (n, (height + n, 30)) for n in range(count)}
    images = {
        i: np.random.default_rng(n).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, (n, shape) in shapes.items()
    }
    masks = {
        i: np.random.default_rng(100 + n).integers(0, 2, shape, dtype=np.uint8) for i, (n, shape) in shapes.items()
    }
    return MemorySource(images, masks, **faults)
