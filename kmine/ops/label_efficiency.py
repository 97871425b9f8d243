"""Number of labels that one method needs to match another, read from its label-efficiency curve.

Letters: R runs (seeds), N images, G groups of dependent images, F label fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmine.types import Floats

NUM_DRAWS = 2000


@dataclass(frozen=True)
class LabelsNeeded:
    """Number of labels with its 95 % interval; infinite if the curve stays below the target."""

    needed: float
    low: float
    high: float


def labels_needed(counts: Sequence[float], scores: Floats, target: float) -> float:
    """Number of labels at which a label-efficiency curve reaches `target`, interpolated over its logarithm.

    Isotonic regression makes the curve non-decreasing first: a drop with more labels is taken as noise.

    Args:
        counts: (F,) numbers of labels, increasing.
        scores: (F,) mean score at each.
        target: score to reach.

    Returns:
        A number of labels: `counts[0]` if the curve starts above the target, infinity if it ends below.
    """
    from sklearn.isotonic import isotonic_regression

    rising = isotonic_regression(np.asarray(scores, float))
    if target <= rising[0]:
        return float(counts[0])
    if target > rising[-1]:
        return float("inf")
    above = int(np.searchsorted(rising, target))  # first index at or above the target
    share = (target - rising[above - 1]) / (rising[above] - rising[above - 1])
    first, last = np.log(counts[above - 1]), np.log(counts[above])
    return float(np.exp(first + share * (last - first)))


def labels_to_match(
    counts: Sequence[float], curve: Sequence[Floats], other: Floats, groups: Sequence[str], *, seed: int
) -> LabelsNeeded:
    """Number of labels that the method of `curve` needs for the mean score of `other`, with a bootstrap interval.

    Groups and seeds are resampled with replacement, the same ones for all scores. With few seeds the interval is
    somewhat too narrow.

    Args:
        counts: (F,) numbers of labels, increasing.
        curve: F arrays (R, N), scores of the images in the runs; NaN where there is none.
        other: (R, N) scores of the same images and seeds.
        groups: (N,) group of each image.
        seed: seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    stack = np.stack([*curve, other])
    needed = labels_needed(counts, _means(stack)[:-1], float(_means(stack)[-1]))
    names, index = np.unique(list(groups), return_inverse=True)
    members = [np.flatnonzero(index == n) for n in range(len(names))]
    drawn = []
    for _ in range(NUM_DRAWS):
        images = np.concatenate([members[n] for n in rng.integers(0, len(names), len(names))])
        means = _means(stack[:, rng.integers(0, stack.shape[1], stack.shape[1])][:, :, images])
        if np.isfinite(means).all():
            drawn.append(labels_needed(counts, means[:-1], float(means[-1])))
    # `inverted_cdf` picks drawn values: interpolation between a number and infinity would give infinity or NaN.
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf") if drawn else (np.nan, np.nan)
    return LabelsNeeded(needed, float(low), float(high))


def _means(stack: Floats) -> Floats:
    """(F + 1, R, N) -> (F + 1,) means over the finite scores."""
    finite = np.isfinite(stack)
    with np.errstate(invalid="ignore"):
        return np.where(finite, stack, 0.0).sum(axis=(1, 2)) / finite.sum(axis=(1, 2))
