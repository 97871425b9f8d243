"""Windowing: stored values of any range as 8-bit grey."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LIVER_WINDOW = (-160.0, 240.0)
"""Hounsfield units shown as black and as white: a usual window for the liver, default for LiTS."""
BLOCK = 2**20
"""Values converted at once; the conversion needs eight times their memory."""


def windowed(
    values: NDArray[Any], window: tuple[float, float], slope: float = 1.0, intercept: float = 0.0
) -> NDArray[np.uint8]:
    """Linear grey: 0 at and below the first value of the window, 255 at and above the second, rounded.

    Args:
        values: (H, W) as stored; NaN becomes 0.
        window: (low, high) in units of `values * slope + intercept`, low < high.

    Returns:
        (H, W), [0, 255].
    """
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK // max(1, values[:1].size))
    low, high = window
    for start in range(0, len(values), rows):
        scaled = values[start : start + rows].astype(np.float64)
        if (slope, intercept) != (1, 0):
            with np.errstate(over="ignore", invalid="ignore"):  # an overflow lies outside the window anyway
                scaled = scaled * slope + intercept
        if values.dtype.kind == "f":
            scaled[np.isnan(scaled)] = low
        np.clip(scaled, low, high, out=scaled)
        scaled -= low
        scaled *= 255
        scaled /= high - low
        grey[start : start + rows] = np.rint(scaled, out=scaled)
    return grey


def grey_as_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 3), three equal channels."""
    return np.repeat(grey[..., None], 3, axis=2)
