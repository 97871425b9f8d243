"""Paired comparison of two methods, or of two rounds, over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALL_SPLIT = 20
"""With fewer images than this, the mean of a paired difference is taken as it is."""


@dataclass(frozen=True)
class Paired:
    """A paired difference with its uncertainty."""

    difference: float
    """Mean of b - a."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    num_pairs: int


def paired_difference(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    *,
    seed: int,
    num_resamples: int = 4000,
    confidence: float = 0.95,
) -> Paired:
    """Mean of b - a with a percentile bootstrap interval (95 % unless told) over seeds and images.

    Args:
        a, b: (R, N), a score of each of N images in each of R runs (seeds) on one test split; a pair with a NaN on
            either side is left out.
        seed: of the resampling.
        num_resamples: bootstrap resamples; runs and images are drawn independently, with replacement.
        confidence: of the two-sided interval, below 1.

    Raises:
        ValueError: other shapes, or no pair at all.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected two arrays (runs, images) of one shape, got {a.shape} and {b.shape}")
    gap = b - a
    known = np.isfinite(gap)
    if not known.any():
        raise ValueError("no image has a score under both methods")
    rng = np.random.default_rng(seed)
    num_runs, num_images = gap.shape
    filled = np.where(known, gap, 0.0)
    means = np.empty(num_resamples)
    for i in range(num_resamples):
        runs = np.bincount(rng.integers(num_runs, size=num_runs), minlength=num_runs)
        images = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        weight = np.outer(runs, images) * known
        means[i] = (filled * weight).sum() / max(weight.sum(), 1)
    outside = 50 * (1 - confidence)
    low, high = np.percentile(means, [outside, 100 - outside])
    return Paired(float(gap[known].mean()), float(low), float(high), int(known.sum()))


def paired_change(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Mean of after - before over images, with a two-sided 90 % interval: each end is a one-sided bound of 95 %.

    An image without a number, because truth and prediction are empty, is answered as well as can be: beside a number it
    counts as 1, so that a new false alarm is a loss. Where both sides have none the image is left out; where no image
    remains, all is NaN.

    Args:
        before, after: Dice of the same images, in the same order.
    """
    a, b = (np.asarray(values, float) for values in (before, after))
    known = ~(np.isnan(a) & np.isnan(b))
    if not known.any():
        return Paired(np.nan, np.nan, np.nan, 0)
    a, b = (np.where(np.isnan(values), 1.0, values)[None, known] for values in (a, b))
    return paired_difference(a, b, seed=0, confidence=0.9)


def is_fall(change: Paired, tolerance: float) -> bool:
    """Whether a change is a fall by more than `tolerance`, and one beyond noise.

    With fewer than `SMALL_SPLIT` images no interval can be trusted: there the mean alone decides.
    """
    return change.difference < -tolerance and (change.num_pairs < SMALL_SPLIT or change.high < 0)
