"""Stored values of any range as 8-bit grey."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**20
"""Values converted at once: in between they take eight times their memory."""


def windowed(
    values: NDArray[Any], window: tuple[float, float], slope: float = 1.0, intercept: float = 0.0
) -> NDArray[np.uint8]:
    """Grey: black at and below the window's first value, white at and above its second, linear and rounded between.

    Args:
        values: (H, W) as stored; those that are no number are black.
        window: two rising numbers.
        slope: `values * slope + intercept` is what is windowed.
        intercept: see above.

    Returns:
        (H, W), [0, 255].
    """
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK // max(1, values[:1].size))
    low, high = window
    for start in range(0, len(values), rows):
        scaled = values[start : start + rows].astype(np.float64)
        if (slope, intercept) != (1, 0):
            with np.errstate(over="ignore", invalid="ignore"):  # beyond all numbers is beyond the window
                scaled = scaled * slope + intercept
        if values.dtype.kind == "f":
            scaled[np.isnan(scaled)] = low
        np.clip(scaled, low, high, out=scaled)
        scaled -= low
        scaled *= 255
        scaled /= high - low
        grey[start : start + rows] = np.rint(scaled, out=scaled)
    return grey
