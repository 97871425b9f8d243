"""Resizing between the native frame and the square input of the local model, S x S."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.config import DataConfig
from kmine.types import IGNORE_INDEX


class Resizer(NamedTuple):
    """How images and masks become the square input of the local model, and its output those of the image again."""

    size: int
    """S."""
    letterbox: bool = False
    """Keep the ratio of the sides: the image lies in the middle, and the rest is black, `IGNORE_INDEX` in masks."""
    by_area: bool = True
    """Shrink a mask to the class that covers most of each pixel (255 is one; of equals the lowest), or to that of the
    nearest pixel."""

    @classmethod
    def of(cls, cfg: DataConfig) -> Resizer:
        """That of a run."""
        return cls(cfg.size, cfg.resize == "letterbox", cfg.mask_resize == "area")

    def image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) or (H, W, 3) -> (S, S) or (S, S, 3): area average along sides that shrink, else bilinear."""
        square = np.zeros((self.size, self.size, *image.shape[2:]), np.uint8)
        content = self.content(np.moveaxis(square, -1, 0) if image.ndim == 3 else square, *image.shape[:2])
        resized = _resized(image, *content.shape[-2:])
        content[...] = np.moveaxis(resized, -1, 0) if image.ndim == 3 else resized
        return square

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) class ids -> (S, S); no new ids arise."""
        square = np.full((self.size, self.size), IGNORE_INDEX, np.uint8)
        content = self.content(square, *mask.shape)
        if self.by_area and (mask.shape[0] > content.shape[0] or mask.shape[1] > content.shape[1]):
            ids = np.unique(mask)
            shares = np.stack([_resized((mask == i).astype(np.float32), *content.shape) for i in ids])
            content[...] = ids[shares.argmax(axis=0)]
        else:
            content[...] = cv2.resize(mask, content.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return square

    def content(self, planes: NDArray[Any], height: int, width: int) -> NDArray[Any]:
        """(..., S, S) -> view of the part (..., h, w) that shows an image of `height` x `width`."""
        if not self.letterbox:
            return planes
        sides = [max(1, round(side * self.size / max(height, width))) for side in (height, width)]
        top, left = ((self.size - side) // 2 for side in sides)
        return planes[..., top : top + sides[0], left : left + sides[1]]


def _resized(array: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    smaller = (min(array.shape[1], width), min(array.shape[0], height))
    shrunk = cv2.resize(array, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_LINEAR)


def to_frame(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(C, S, S) -> (C, height, width), bilinear; keeps sums over C."""
    if planes.shape[1:] == (height, width):
        return planes
    return np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in planes])
