"""Resizing between the native frame and the square input of the local model, S x S."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (size, size, 3): area average along sides that shrink, bilinear along sides that grow."""
    height, width = image.shape[:2]
    shrunk = cv2.resize(image, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(cv2.resize(shrunk, (size, size), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def resize_mask(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W) class ids -> (size, size), nearest pixel: no new ids, 255 stays 255."""
    resized = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.ascontiguousarray(resized, dtype=np.uint8)


def to_frame(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(C, S, S) -> (C, height, width), bilinear; keeps sums over C."""
    if planes.shape[1:] == (height, width):
        return planes
    return np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in planes])
