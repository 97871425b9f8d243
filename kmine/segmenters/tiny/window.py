"""The crop around a box: the only conversion between the image's own frame and the crop's frame.

Both frames count pixel centres as integers: pixel (row 0, column 0) is the point (0, 0) and reaches from -0.5 to 0.5.
A window is a rectangle of whole image pixels, resized to S x S with one factor per axis. It may reach over the image's
border; there the crop repeats the last pixel, and `limits` marks the border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MARGIN = 0.4
"""Context on every side, as a share of the box's side, see `MAX_ASPECT`."""
MAX_ASPECT = 2.0
"""A longer box gets more context along its short side instead of more distortion."""
MIN_WINDOW = 16.0
"""Least side of a window in image pixels, so that a dot has context."""


@dataclass(frozen=True)
class Window:
    """A rectangle of the image, and the side of its crop."""

    left: int
    top: int
    width: int
    height: int
    side: int
    """S, pixels of the crop."""

    def to_crop(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., 2) points (x, y) of the image's frame to the crop's frame."""
        scale = np.array([self.side / self.width, self.side / self.height])
        return ((np.asarray(points, np.float64) - (self.left, self.top) + 0.5) * scale - 0.5).astype(np.float32)

    def limits(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """(4,) XYXY in crop pixels: outer edges of an image of `size` = (H, W)."""
        height, width = size
        return self.to_crop(np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]])).ravel()

    def crop(self, plane: NDArray[np.generic]) -> NDArray[np.generic]:
        """(H, W) or (H, W, C) in the image's frame to (S, S) or (S, S, C), of the same dtype."""
        height, width = plane.shape[:2]
        top, bottom, left, right = self._visible((height, width))
        visible = plane[top:bottom, left:right]
        pads = top - self.top, self.top + self.height - bottom, left - self.left, self.left + self.width - right
        if any(pads):
            visible = cv2.copyMakeBorder(visible, *pads, cv2.BORDER_REPLICATE)
        return _resize(np.ascontiguousarray(visible), self.side, self.side)

    def paste(
        self, plane: NDArray[np.float32], size: tuple[int, int]
    ) -> tuple[NDArray[np.float32], tuple[slice, slice]]:
        """(S, S) to the image's frame: the part inside an image of `size` = (H, W), and its rows and columns there."""
        top, bottom, left, right = self._visible(size)
        full = _resize(plane, self.width, self.height)
        visible = full[top - self.top : bottom - self.top, left - self.left : right - self.left]
        return visible, (slice(top, bottom), slice(left, right))

    def _visible(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right), ends exclusive, of the part inside an image of `size`."""
        height, width = size
        return (
            max(self.top, 0),
            min(self.top + self.height, height),
            max(self.left, 0),
            min(self.left + self.width, width),
        )


def window_sides(width: float, height: float) -> tuple[float, float]:
    """(width, height) of the window of a box of these sides, in pixels of the image."""
    grown = 1 + 2 * MARGIN
    across, down = max(width, height / MAX_ASPECT), max(height, width / MAX_ASPECT)
    return max(grown * across, MIN_WINDOW), max(grown * down, MIN_WINDOW)


def window_of(box: NDArray[np.floating], side: int) -> Window:
    """The window around a box.

    Args:
        box: (4,) XYXY in pixels, with area, at least partly inside the image.
        side: S, pixels of the crop.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    across, down = window_sides(x1 - x0, y1 - y0)
    left, right = _whole((x0 + x1 - across) / 2, (x0 + x1 + across) / 2)
    top, bottom = _whole((y0 + y1 - down) / 2, (y0 + y1 + down) / 2)
    return Window(left, top, right - left, bottom - top, side)


def _whole(low: float, high: float) -> tuple[int, int]:
    """First pixel and one past the last pixel of an interval."""
    return math.floor(low + 0.5), math.ceil(high + 0.5)


def _resize(plane: NDArray[np.generic], width: int, height: int) -> NDArray[np.generic]:
    """Averages where an image shrinks, interpolates where it grows."""
    if plane.shape[:2] == (height, width):
        return plane
    shrinks = width <= plane.shape[1] and height <= plane.shape[0]
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
