"""Paired comparison of two methods, or of two rounds, over the same images.

Letters: R runs (seeds), N images, G groups of dependent images (volumes, patients; by default each image is one).

Results are to generalise to other images and other seeds, so both are crossed random effects. A difference is modelled
as mean + seed effect + group effect + residual. The variance of the mean comes from the three mean squares of a two-way
analysis of variance (Searle, Casella, McCulloch: Variance Components, 1992). The degrees of freedom (Satterthwaite
1946) account for a small number of seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmine.types import Bool, Floats

SMALL_SPLIT = 20
"""Number of images below which the interval of a paired difference is not relied on."""
GAIN_SPREAD = 0.2
"""Standard deviation, from image to image, of the difference in Dice of two models of few labels: own choice; .18 in
the Kvasir-SEG row from scratch of README."""
MAX_SIGNS = 2**22
"""Largest number of signs drawn at once (memory)."""


@dataclass(frozen=True)
class Paired:
    """A paired difference with its uncertainty."""

    difference: float
    """Mean of b - a."""
    low: float
    """Lower end of the interval; NaN with a single group, like `high`."""
    high: float
    num_pairs: int
    p_value: float = float("nan")
    """Two-sided p of the sign-flip test; NaN with a single group."""


def paired_difference(
    a: Floats,
    b: Floats,
    *,
    seed: int,
    groups: Sequence[str] | None = None,
    num_flips: int = 9999,
    confidence: float = 0.95,
) -> Paired:
    """Mean of b - a over pairs, with a two-sided t-interval over seeds and groups, and a sign-flip p.

    Args:
        a, b: (R, N) scores of N images in R runs (seeds) on one test split; a pair with NaN on either side is excluded
            (a run lacks the image). Dice of empty truth and prediction goes through `score_empty_cases` first.
        seed: seed of the signs.
        groups: (N,) independent unit of each image (volume, patient); None: each image is its own.
        num_flips: sign vectors drawn; 0 skips the test.
        confidence: confidence of the interval, below 1.

    Raises:
        ValueError: different shapes, or no pair.
    """
    from scipy.special import stdtrit

    if a.shape != b.shape or a.ndim != 2 or (groups is not None and len(groups) != a.shape[1]):
        raise ValueError(
            f"expected two arrays (runs, images) of one shape and one group per image, got {a.shape} and {b.shape}"
            + ("" if groups is None else f" and {len(groups)} groups")
        )
    gap = b - a
    finite = np.isfinite(gap)
    if not finite.any():
        raise ValueError("no image has a score under both methods")
    sums, counts = _by_group(np.where(finite, gap, 0.0), finite, groups)
    total = counts.sum()
    mean, num_pairs = float(sums.sum() / total), int(total)
    if sums.shape[1] < 2:
        return Paired(mean, np.nan, np.nan, num_pairs)
    # Linearised ratio estimate: groups may differ in size, and pairs may be missing.
    scale = sums.size / total
    of_groups, of_seeds, degrees = _spread((sums - mean * counts) * scale)
    half = stdtrit(max(degrees, 1.0), (1 + confidence) / 2) * np.sqrt(of_groups + of_seeds)
    p_value = _sign_flip_p((sums * scale).mean(axis=0), len(sums), of_seeds, seed, num_flips)
    return Paired(mean, float(mean - half), float(mean + half), num_pairs, p_value)


def smallest_shown(num_units: int, spread: float = GAIN_SPREAD) -> float:
    """Half width of the 95 % t-interval of a mean difference over `num_units` images or groups; infinite below 2.

    `spread`: standard deviation of the differences. A smaller gain cannot be told from noise.
    """
    from scipy.special import stdtrit

    return float(stdtrit(num_units - 1, 0.975) * spread / np.sqrt(num_units)) if num_units > 1 else np.inf


def _by_group(gap: Floats, finite: Bool, groups: Sequence[str] | None) -> tuple[Floats, Floats]:
    """(R, G) sums of the gaps and numbers of pairs; groups and runs without any pair are dropped."""
    num_runs, num_images = gap.shape
    index = np.arange(num_images) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    sums, counts = np.zeros((2, num_runs, int(index.max()) + 1))
    for run in range(num_runs):
        np.add.at(sums[run], index, gap[run])
        np.add.at(counts[run], index, finite[run])
    rows, columns = counts.any(axis=1), counts.any(axis=0)
    return sums[rows][:, columns], counts[rows][:, columns]


def _spread(gap: Floats) -> tuple[float, float, float]:
    """Variances of the mean of (R, G) gaps due to groups and to seeds, and the degrees of freedom of their sum.

    With a single run, or a negative estimate, that of seeds is 0: the result then holds for these seeds only.
    """
    (num_runs, num_groups), cells = gap.shape, gap.size
    by_run, by_group, mean = gap.mean(axis=1), gap.mean(axis=0), gap.mean()
    of_groups = num_runs * ((by_group - mean) ** 2).sum() / (num_groups - 1) / cells
    if num_runs == 1:
        return float(of_groups), 0.0, num_groups - 1
    rest_degrees = (num_runs - 1) * (num_groups - 1)
    rest = ((gap - by_run[:, None] - by_group + mean) ** 2).sum() / rest_degrees / cells
    seeds = num_groups * ((by_run - mean) ** 2).sum() / (num_runs - 1) / cells
    if seeds <= rest:
        return float(of_groups), 0.0, num_groups - 1
    total = of_groups + seeds - rest
    variance_of_variance = of_groups**2 / (num_groups - 1) + seeds**2 / (num_runs - 1) + rest**2 / rest_degrees
    return float(of_groups), float(seeds - rest), float(total**2 / variance_of_variance)


def _sign_flip_p(gaps: Floats, num_runs: int, seed_variance: float, seed: int, num_flips: int) -> float:
    """Two-sided p of no difference, from (G,) gaps averaged over the runs.

    One sign per group applies to all its runs: under different seeds the gaps of one image are not independent. Signs
    of seeds are not drawn: 5 seeds have 32 sign vectors, so the smallest p would be 0.06. The seeds' variance enters
    every draw as t noise with R - 1 degrees of freedom; without it a lucky seed would count as a difference.
    """
    if not num_flips:
        return float("nan")
    rng = np.random.default_rng(seed)
    observed, beyond = abs(gaps.mean()) * (1 - 1e-9), 0
    rows = max(1, MAX_SIGNS // len(gaps))
    for first in range(0, num_flips, rows):
        count = min(rows, num_flips - first)
        signs = rng.integers(0, 2, (count, len(gaps)), np.int8)
        # A sign of -1 subtracts twice the gap.
        drawn = gaps.mean() - 2 * (signs @ gaps) / len(gaps)
        if seed_variance > 0:
            drawn = drawn + np.sqrt(seed_variance) * rng.standard_t(num_runs - 1, count)
        beyond += int((np.abs(drawn) >= observed).sum())
    return (1 + beyond) / (1 + num_flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of a family of p, in the given order; NaN stays NaN and is not counted."""
    adjusted = [float("nan")] * len(p_values)
    order = sorted((p, n) for n, p in enumerate(p_values) if not np.isnan(p))
    least = 0.0
    for rank, (p, n) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        adjusted[n] = least
    return adjusted


def score_empty_cases(dice: Floats) -> Floats:
    """Dice with 1 for NaN (truth and prediction empty): silence on a clean image is right; a false alarm has 0.

    Every image then counts under every method, and all means have one denominator. NaN must have no other meaning: do
    this before images that a run lacks become NaN.
    """
    return np.where(np.isnan(dice), 1.0, dice)


def paired_change(
    before: Sequence[float], after: Sequence[float], *, groups: Sequence[str] | None = None, confidence: float = 0.9
) -> Paired:
    """Mean of after - before over images, with a two-sided 90 % interval: each end is a one-sided 95 % bound.

    NaN is scored by `score_empty_cases`. All is NaN without images.

    Args:
        before, after: Dice of the same images, in the same order.
        groups: independent unit of each image; None: each is its own.
        confidence: confidence of the interval, below 1.
    """
    a, b = (score_empty_cases(np.asarray([values], float)) for values in (before, after))
    if not a.size:
        return Paired(np.nan, np.nan, np.nan, 0)
    return paired_difference(a, b, seed=0, groups=groups, confidence=confidence, num_flips=0)


def is_fall(best: Sequence[float], last: Sequence[float], tolerance: float) -> bool:
    """Whether the mean Dice of images fell, since the best of several validations, by more than noise explains.

    From `SMALL_SPLIT` images on: by more than `tolerance`, with an interval (`paired_change`) below zero. Fewer images
    have no interval to rely on, and the best of several of their means is high by chance: there it is a fall to less
    than half, as of a training that collapsed (own choice).

    Args:
        best, last: Dice of the same images, in the same order.
        tolerance: in Dice.
    """
    change = paired_change(best, last)
    if change.num_pairs < SMALL_SPLIT:
        return change.difference < -max(tolerance, float(np.mean(score_empty_cases(np.asarray(best, float)))) / 2)
    return change.difference < -tolerance and change.high < 0
