"""The crop around a box: the only conversion between the image's own frame and the crop's frame.

In both, pixel (row 0, column 0) is the point (0, 0) and reaches from -0.5 to 0.5.
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
    """A rectangle of whole image pixels, resized to a crop of S x S with one factor per axis.

    Beyond the image's border the crop repeats the last pixel, and `limits` marks the border.
    """

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
        rows, columns = self.visible(plane.shape[:2])
        above, below = rows.start - self.top, self.top + self.height - rows.stop
        before, after = columns.start - self.left, self.left + self.width - columns.stop
        visible = plane[rows, columns]
        if above or below or before or after:
            visible = cv2.copyMakeBorder(visible, above, below, before, after, cv2.BORDER_REPLICATE)
        return _resize(np.ascontiguousarray(visible), self.side, self.side)

    def paste(self, plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """(S, S) to the image's frame: the part that is `visible` in an image of `size` = (H, W)."""
        rows, columns = self.visible(size)
        full = _resize(plane, self.width, self.height)
        return full[rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left]

    def visible(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the part inside an image of `size` = (H, W)."""
        bottom, right = min(self.top + self.height, size[0]), min(self.left + self.width, size[1])
        return slice(max(self.top, 0), bottom), slice(max(self.left, 0), right)


def window_sides(width: float, height: float) -> tuple[float, float]:
    """(width, height) of the window of a box of these sides, in pixels of the image."""
    grown = 1 + 2 * MARGIN
    across, down = max(width, height / MAX_ASPECT), max(height, width / MAX_ASPECT)
    return max(grown * across, MIN_WINDOW), max(grown * down, MIN_WINDOW)


def window_of(box: NDArray[np.floating], side: int) -> Window:
    """The window around a box, (4,) XYXY in pixels, with area, at least partly inside the image; `side` is S."""
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
