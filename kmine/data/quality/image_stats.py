"""Statistics of images and masks: size, brightness, class counts, hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.pictures import FOREGROUND_ABOVE
from kmine.data.perceptual_hash import grey_of, hash_views
from kmine.types import IGNORE_INDEX

FLAT = 1.0
"""An image with a smaller standard deviation of its grey values is blank."""


@dataclass(frozen=True)
class MaskStats:
    """Statistics of one mask."""

    shape: tuple[int, ...]
    pixels: dict[int, int]
    """Number of pixels by class id."""
    rim_share: float
    """Share of foreground among the outermost pixels."""
    fingerprint: bytes
    """Hash of shape and pixels."""
    like_image: float
    """Dice of the foreground and the bright pixels of the image; 0 for another size."""

    @property
    def num_foreground(self) -> int:
        """Number of foreground pixels, without ignored ones."""
        return sum(n for value, n in self.pixels.items() if value not in (0, IGNORE_INDEX))

    @property
    def foreground_share(self) -> float:
        """Share of foreground pixels, without ignored ones."""
        return self.num_foreground / sum(self.pixels.values())

    @property
    def maybe_inverted(self) -> bool:
        """Whether the foreground covers most of the image and most of its rim."""
        return self.foreground_share > 0.5 and self.rim_share > 0.5


@dataclass(frozen=True)
class ImageStats:
    """Statistics of one sample (about 10 kB)."""

    sample_id: str
    shape: tuple[int, int]
    low: int
    high: int
    mean: float
    contrast: float
    """Standard deviation of the grey values."""
    fingerprint: bytes
    """Hash of shape and pixels, independent of file name and lossless format."""
    image_hash: int
    small: NDArray[np.uint8]
    """(SMALL, SMALL) grey, the hashed part, see `kmine.data.perceptual_hash`."""
    whole: NDArray[np.uint8]
    """(SMALL, SMALL) grey, the whole image."""
    mask: MaskStats | None
    """None where there is no readable mask."""


def compute_stats(sample_id: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> ImageStats:
    """Statistics of an (H, W, 3) RGB image, [0, 255], and of its class ids, also of another size than the image."""
    height, width = image.shape[:2]
    grey = grey_of(image)
    image_hash, small, whole = hash_views(grey)
    values = np.asarray(grey)
    return ImageStats(
        sample_id=sample_id,
        shape=(height, width),
        low=int(image.min()),
        high=int(image.max()),
        mean=float(image.mean()),
        contrast=float(values.std()),
        fingerprint=_fingerprint(image),
        image_hash=image_hash,
        small=small,
        whole=whole,
        mask=None if mask is None else compute_mask_stats(mask, values > FOREGROUND_ABOVE),
    )


def compute_mask_stats(mask: NDArray[np.uint8], bright: NDArray[np.bool_] | None = None) -> MaskStats:
    """Statistics of one (H, W) mask of class ids; `bright` marks the bright pixels of the image, for `like_image`."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    inside = (mask != 0) & (mask != IGNORE_INDEX)
    if bright is None or mask.shape != bright.shape:
        bright = np.zeros_like(inside)
    both = int((inside & bright).sum())
    return MaskStats(
        shape=mask.shape,
        pixels={int(v): int(counts[v]) for v in np.flatnonzero(counts)},
        rim_share=float(((rim != 0) & (rim != IGNORE_INDEX)).mean()),
        fingerprint=_fingerprint(mask),
        like_image=2 * both / max(int(inside.sum()) + int(bright.sum()), 1),
    )


def _fingerprint(array: NDArray[np.uint8]) -> bytes:
    blake = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    blake.update(np.ascontiguousarray(array))
    return blake.digest()
