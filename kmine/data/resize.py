"""Resizing between the native frame and the square input of the local model, S x S."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (size, size, 3): area average along sides that shrink, bilinear along sides that grow."""
    return np.ascontiguousarray(_shrunk(image, size), dtype=np.uint8)


def resize_mask(mask: NDArray[np.uint8], size: int, *, by_area: bool = True) -> NDArray[np.uint8]:
    """(H, W) class ids -> (size, size): the id that covers most of each pixel, or that of the nearest pixel.

    255 counts as an id, and no new ids arise; of ids that cover a pixel equally the lowest is taken.
    """
    if by_area and max(mask.shape) > size:
        ids = np.unique(mask)
        shares = np.stack([_shrunk((mask == i).astype(np.float32), size) for i in ids])
        return ids[shares.argmax(axis=0)]
    resized = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.ascontiguousarray(resized, dtype=np.uint8)


def _shrunk(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Area average along sides that shrink, bilinear along sides that grow."""
    height, width = array.shape[:2]
    shrunk = cv2.resize(array, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (size, size), interpolation=cv2.INTER_LINEAR)


def to_frame(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(C, S, S) -> (C, height, width), bilinear; keeps sums over C."""
    if planes.shape[1:] == (height, width):
        return planes
    return np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in planes])
