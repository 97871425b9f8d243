"""Paired comparison of two methods over the same images and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Paired:
    """A paired difference with its uncertainty."""

    difference: float
    """Mean of b - a."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    num_pairs: int


def paired_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], *, seed: int, num_resamples: int = 4000
) -> Paired:
    """Mean of b - a with a 95 % percentile bootstrap interval over seeds and images.

    Args:
        a, b: (R, N), a score of each of N images in each of R runs (seeds) on one test split; a pair with a NaN on
            either side is left out.
        seed: of the resampling.
        num_resamples: bootstrap resamples; runs and images are drawn independently, with replacement.

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
    low, high = np.percentile(means, [2.5, 97.5])
    return Paired(float(gap[known].mean()), float(low), float(high), int(known.sum()))
