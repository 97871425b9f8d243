"""How bright images are, so that one unlike those of training can be told: measured as the local model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MEASURES = ("red", "green", "blue", "contrast")
"""Mean of each channel, and standard deviation of the grey values; on [0, 255]."""
MAX_IMAGES = 500
"""More are not looked at, spread evenly: the fences below do not move any more."""
FENCE = 1.5
"""Quartile ranges beyond the quartiles: Tukey's fence."""
LEAST_RANGE = 4.0
"""Of the quartiles, in grey values: pictures of one and the same brightness are no reason to warn of another."""


def measure(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(S, S, 3) RGB -> (4,), one value for each of `MEASURES`."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.array([*cv2.mean(image)[:3], cv2.meanStdDev(grey)[1].item()])


def intensity_ranges(images: Iterable[NDArray[np.uint8]]) -> dict[str, Any]:
    """What run.json keeps of the training images: for each measure, the range outside of which an image is far.

    The range holds every image that was looked at, and reaches to the fence where that lies further out.
    """
    rows = np.array([measure(image) for image in images])
    if not len(rows):
        return {"num_images": 0}
    first, third = np.percentile(rows, [25, 75], axis=0)
    reach = FENCE * np.maximum(third - first, LEAST_RANGE)
    low, high = np.minimum(rows.min(axis=0), first - reach), np.maximum(rows.max(axis=0), third + reach)
    low, high = np.floor(100 * low) / 100, np.ceil(100 * high) / 100  # outwards, so that rounding shuts nobody out
    ranges = {name: [float(a), float(b)] for name, a, b in zip(MEASURES, low, high, strict=True)}
    return {"num_images": len(rows), "ranges": ranges}


def out_of_range_text(training: Mapping[str, Any] | None, image: NDArray[np.uint8]) -> str:
    """In what an image (S, S, 3) lies outside of the ranges, as in "contrast 3 (training: 12 to 80)"; else empty."""
    ranges = (training or {}).get("ranges", {})
    values = zip(MEASURES, measure(image), strict=True) if ranges else ()
    far = [
        f"{name} {value:.0f} (training: {max(0, ranges[name][0]):.0f} to {min(255, ranges[name][1]):.0f})"
        for name, value in values
        if not ranges[name][0] <= value <= ranges[name][1]
    ]
    return ", ".join(far)
