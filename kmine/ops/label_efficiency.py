"""How many labels one method needs to do as well as another: read off its label-efficiency curve.

Legend: R runs (seeds), N images, G groups of images that belong together, F label fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_DRAWS = 2000


@dataclass(frozen=True)
class LabelsNeeded:
    """A number of labels with its 95 % interval; infinite where the curve never comes that high."""

    needed: float
    low: float
    high: float


def labels_needed(counts: Sequence[float], scores: Floats, target: float) -> float:
    """Where a label-efficiency curve reaches `target`, interpolated over the logarithm of the number of labels.

    The curve is first made to rise throughout (isotonic regression): noise makes a method worse, more labels do not.

    Args:
        counts: (F,) numbers of labels, rising.
        scores: (F,) mean score at each.
        target: the score to reach.

    Returns:
        A number of labels; the first one where the curve begins above the target, infinity where it ends below.
    """
    from sklearn.isotonic import isotonic_regression

    rising = isotonic_regression(np.asarray(scores, float))
    if target <= rising[0]:
        return float(counts[0])
    if target > rising[-1]:
        return float("inf")
    above = int(np.searchsorted(rising, target))  # the first place that reaches the target
    share = (target - rising[above - 1]) / (rising[above] - rising[above - 1])
    first, last = np.log(counts[above - 1]), np.log(counts[above])
    return float(np.exp(first + share * (last - first)))


def labels_to_match(
    counts: Sequence[float], curve: Sequence[Floats], other: Floats, groups: Sequence[str], *, seed: int
) -> LabelsNeeded:
    """How many labels the method of `curve` needs for the mean score of `other`, with a bootstrap interval.

    Groups and seeds are drawn anew, with replacement, the same ones for all scores. With a few seeds such an interval
    is somewhat too narrow.

    Args:
        counts: (F,) numbers of labels, rising.
        curve: F times (R, N), the score of each image in each run; NaN where there is none.
        other: (R, N), of the same images and seeds.
        groups: (N,) the group of each image.
        seed: of the draws.
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
    # `inverted_cdf`: a quantile between a number and infinity is one of the two, never a mean of them.
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf") if drawn else (np.nan, np.nan)
    return LabelsNeeded(needed, float(low), float(high))


def _means(stack: Floats) -> Floats:
    """(F + 1, R, N) -> (F + 1,), over the pairs that have a score."""
    finite = np.isfinite(stack)
    with np.errstate(invalid="ignore"):
        return np.where(finite, stack, 0.0).sum(axis=(1, 2)) / finite.sum(axis=(1, 2))
