"""Stored values of any range as 8-bit grey."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def windowed(values: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Grey: black at and below the window's first value, white at and above its second, linear and rounded between.

    Values that are no number are black.
    """
    low, high = window
    clipped = np.clip(values, low, high).astype(np.float64)
    return np.rint((np.nan_to_num(clipped, nan=low) - low) * 255 / (high - low)).astype(np.uint8)
