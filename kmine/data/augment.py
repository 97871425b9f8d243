"""Training augmentation with albumentations, imported at the first use, as that takes seconds."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kmine.config import FitConfig
from kmine.data.resize import Resizer
from kmine.data.source import Symmetry
from kmine.ops.seeding import derive_seed
from kmine.types import IGNORE_INDEX

if TYPE_CHECKING:
    import albumentations

DEFAULT_SYMMETRY = Symmetry()


def symmetry_of(cfg: FitConfig, default: Symmetry = DEFAULT_SYMMETRY) -> Symmetry:
    """Changes of geometry that `cfg` names, with those of `default` for what it leaves open."""
    return Symmetry(
        default.flips if cfg.flips == "auto" else cfg.flips,
        default.rotation if cfg.rotation is None else cfg.rotation,
        default.scale if cfg.scale is None else (cfg.scale[0], cfg.scale[1]),
    )


class Augment:
    """Random changes of geometry, colour and sharpness, determined by (image, mask, seed).

    `strong`: larger changes of colour and sharpness, same geometry. The strong view of UniMatch (arXiv 2208.09910), own
    reading, with noise added; nothing is erased, as that may be the lesion. `geometric_only`: colour and sharpness are
    unchanged. With one seed all three apply the same geometric change. `colours_only`: geometry is unchanged.

    Independent of the order of calls, threads and worker processes. Copies and pickles hold the settings only.
    """

    def __init__(
        self,
        size: int,
        enabled: bool = True,
        strong: bool = False,
        *,
        symmetry: Symmetry = DEFAULT_SYMMETRY,
        geometric_only: bool = False,
        colours_only: bool = False,
        supersample: int = 1,
    ) -> None:
        """For results of `size` x `size`; `enabled=False` changes nothing.

        Geometry is changed at `supersample` times that size, that of the input, which is then reduced.
        """
        assert not (strong and geometric_only) and symmetry.flips != "auto"
        self.size, self.enabled, self.strong, self.geometric_only = size, enabled, strong, geometric_only
        self.symmetry, self.colours_only, self.supersample = symmetry, colours_only, supersample
        self._pipeline: list[albumentations.Compose] = []
        # The pipeline keeps random state between drawing and applying, so calls must not overlap.
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[partial[Augment], tuple[int, bool, bool]]:
        """Rebuild from the settings; the pipeline is built at first use."""
        options = {name: getattr(self, name) for name in ("symmetry", "geometric_only", "colours_only", "supersample")}
        return partial(Augment, **options), (self.size, self.enabled, self.strong)

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Augment one image and its mask together; neither is modified in place.

        Class ids are never blended. Pixels from outside the image are black, and `IGNORE_INDEX` in the mask.

        Args:
            image: (S, S, 3) uint8 RGB, S = `size` x `supersample`.
            mask: (S, S) uint8 class ids, `IGNORE_INDEX` where unknown.
            seed: at least 0; the same seed gives the same change.

        Raises:
            ValueError: for another shape or type.
        """
        self._check(image, mask)
        if not self.enabled:
            return self._reduce(image, mask)
        with self._lock:
            if not self._pipeline:
                colours = list if self.geometric_only else _strong if self.strong else _medium
                geometry = _geometry(self.symmetry)[: 0 if self.colours_only else None]
                parts = [geometry + colours()] if self.supersample == 1 else [geometry, colours()]
                self._pipeline = list(map(_composed, parts))
            # Compose.set_random_seed would give every transform the same stream, so those of equal probability would
            # always coincide. One shared state keeps their draws independent.
            state = np.random.default_rng(seed), random.Random(seed)
            for number, part in enumerate(self._pipeline):
                part.set_random_state(*state)
                changed = part(image=image, mask=mask)
                image, mask = changed["image"], changed["mask"]
                if number == 0:
                    image, mask = self._reduce(image, mask)  # colour and sharpness are those of the final pixels
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)

    def _reduce(self, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if self.supersample == 1:
            return image, mask
        resizer = Resizer(self.size)
        return resizer.image(image), resizer.mask(mask)

    def _check(self, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
        side = self.size * self.supersample
        for name, array, shape in (("image", image, (side, side, 3)), ("mask", mask, (side, side))):
            if array.shape != shape or array.dtype != np.uint8:
                raise ValueError(f"{name}: expected {shape} uint8, got {array.shape} {array.dtype}; resize it first")


def import_albumentations() -> None:
    """Import the library without its look for a newer version on the network."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations  # noqa: F401


def _composed(transforms: Sequence[albumentations.BasicTransform]) -> albumentations.Compose:
    import albumentations as A

    return A.Compose(transforms)


def _geometry(symmetry: Symmetry) -> list[albumentations.BasicTransform]:
    """Changes of geometry, drawn first and thus equal for all variants.

    Keywords of albumentations 2.0; it ignores older ones with a mere warning.
    """
    import_albumentations()
    import albumentations as A
    import cv2

    flips = {"none": [], "horizontal": [A.HorizontalFlip], "both": [A.HorizontalFlip, A.VerticalFlip]}
    return [
        *(flip(p=0.5) for flip in flips[symmetry.flips]),
        A.Affine(
            scale=symmetry.scale,
            translate_percent=(-0.1, 0.1),
            rotate=(-symmetry.rotation, symmetry.rotation),
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            # A reflected border would reflect the mask too, which shall be unknown there.
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            fill_mask=IGNORE_INDEX,
            p=0.7,
        ),
    ]


# The factors of ColorJitter, unlike a shift of saturation, keep grey images (CT, X-ray) grey.


def _medium() -> list[albumentations.BasicTransform]:
    import albumentations as A

    return [
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.03, 0.03), p=0.7),
        A.RandomGamma(gamma_limit=(75, 130), p=0.3),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=0.15),
        A.GaussNoise(std_range=(0.01, 0.05), per_channel=False, p=0.2),
    ]


def _strong() -> list[albumentations.BasicTransform]:
    import albumentations as A

    return [
        A.ColorJitter(brightness=(0.5, 1.5), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.25, 0.25), p=0.8),
        A.ToGray(p=0.2),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
        A.GaussNoise(std_range=(0.02, 0.1), per_channel=False, p=0.3),
    ]


def crop(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], side: int | None, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random square of `side` pixels of an image and its mask; without `side` the whole.

    Half of the squares of an image with objects contain a random pixel of one; objects are rare in large images.
    """
    if side is None or side >= len(mask):
        return image, mask
    rng, most = np.random.default_rng(derive_seed(seed, "crop")), len(mask) - side
    first = rng.integers(0, most + 1, 2)
    rows, cols = np.nonzero((mask > 0) & (mask != IGNORE_INDEX))
    if len(rows) and rng.random() < 0.5:
        pixel = rng.integers(len(rows))
        offset = rng.integers(0, side, 2)
        first = np.clip([rows[pixel] - offset[0], cols[pixel] - offset[1]], 0, most)
    window = slice(first[0], first[0] + side), slice(first[1], first[1] + side)
    return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window])
