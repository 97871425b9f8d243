"""Intensity ranges of the training images, to detect unusual images; measured at the input size S."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MEASURES = ("red", "green", "blue", "contrast")
"""Mean of each channel, and standard deviation of the grey values; in [0, 255]."""
MAX_IMAGES = 500
"""Limit for the measured images, evenly spaced; more do not change the fences."""
FENCE = 1.5
"""Tukey's fence: multiples of the interquartile range beyond the quartiles."""
LEAST_RANGE = 4.0
"""Smallest interquartile range in grey values, for images of nearly equal brightness."""


def measure(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(S, S, 3) RGB -> (4,), one value for each of `MEASURES`."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.array([*cv2.mean(image)[:3], cv2.meanStdDev(grey)[1].item()])


def intensity_ranges(images: Iterable[NDArray[np.uint8]]) -> dict[str, Any]:
    """Range of each measure over the training images, for run.json.

    The range contains all given images and extends at least to the fences.
    """
    rows = np.array([measure(image) for image in images])
    if not len(rows):
        return {"num_images": 0}
    first, third = np.percentile(rows, [25, 75], axis=0)
    reach = FENCE * np.maximum(third - first, LEAST_RANGE)
    low, high = np.minimum(rows.min(axis=0), first - reach), np.maximum(rows.max(axis=0), third + reach)
    low, high = np.floor(100 * low) / 100, np.ceil(100 * high) / 100  # outwards, so that rounding excludes no image
    ranges = {name: [float(a), float(b)] for name, a, b in zip(MEASURES, low, high, strict=True)}
    return {"num_images": len(rows), "ranges": ranges}


def out_of_range_text(training: Mapping[str, Any] | None, image: NDArray[np.uint8]) -> str:
    """Measures of an image (S, S, 3) outside the ranges, as in "contrast 3 (training: 12 to 80)"; else empty."""
    ranges = (training or {}).get("ranges", {})
    values = zip(MEASURES, measure(image), strict=True) if ranges else ()
    far = [
        f"{name} {value:.0f} (training: {max(0, ranges[name][0]):.0f} to {min(255, ranges[name][1]):.0f})"
        for name, value in values
        if not ranges[name][0] <= value <= ranges[name][1]
    ]
    return ", ".join(far)
