"""From the gate's evidence to an estimated Dice, and to what may be promised about the masks that are accepted.

The calibrator learns from objects of labeled images that neither the local model nor the segmenter was trained on:
their evidence, and the Dice that their masks turned out to have. Ridge regression, then isotonic regression of its
out-of-fold predictions: a few dozen objects bear no more.

The promise is a lower bound of the mean Dice of accepted masks, by betting (Waudby-Smith and Ramdas 2024, "Estimating
means of bounded random variables by betting"; here stakes that stay the same, mixed). It holds with the stated
confidence for objects drawn like the labeled ones, whatever their distribution, at thresholds fixed beforehand and with
estimates made without the object in question; several thresholds share the error (Bonferroni), as in Learn then Test
(Angelopoulos et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.ops import masks, metrics
from kmine.ops.calibrator import Calibrator, RiskGuarantee, feature_rows, linear_predictor, standardised
from kmine.seeding import derive_seed
from kmine.types import IGNORE_INDEX, Evidence, Prompts

THRESHOLD_GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of estimated Dice, fixed before any data is seen: the loosest at which the target can be promised is taken."""
MIN_THRESHOLD = 0.5
"""Estimated Dice below which a mask is never let through unless the target allows it."""
MIN_OBJECTS = 20
"""Below, nothing is fitted: thresholds set by hand are the safer guess then."""
MIN_OVERLAP = 0.1
"""IoU from which on a mask is taken to mean a true object."""
FOLDS = 5
PENALTIES = tuple(10.0**k for k in range(-1, 4))
"""Of the ridge regression; the best out of fold is taken."""
BETTING_FRACTIONS = tuple(k / 20 for k in range(1, 20))
"""Shares of the wealth that are bet, side by side."""


def fit_calibrator(
    evidence: Sequence[Evidence], dice: Sequence[float], groups: Sequence[str], *, seed: int
) -> tuple[Calibrator, NDArray[np.float64]] | None:
    """The calibrator, and for each object the estimate of one that was fitted without its group.

    Args:
        evidence: of N objects whose images nothing in the pipeline was trained on.
        dice: N true Dice values.
        groups: N group ids (patients, volumes, near duplicates).
        seed: deals the groups out to folds.

    Returns:
        None with fewer than `MIN_OBJECTS` objects or two groups: then nothing can be learnt.
    """
    rows, truth, names = feature_rows(evidence), np.asarray(dice, float), np.asarray(groups)
    if len(rows) < MIN_OBJECTS or len(set(groups)) < 2:
        return None
    out_of_fold = np.full(len(rows), np.nan)
    for train, test in _folds(names, seed):
        out_of_fold[test] = _fit(rows[train], truth[train], names[train], seed).estimates(rows[test])
    return _fit(rows, truth, names, seed), out_of_fold


def mean_lower_bound(values: Sequence[float] | NDArray[np.float64], confidence: float) -> float:
    """A number that the mean of [0, 1] values exceeds with at least this confidence; 0 for no value.

    A gambler starts with 1 and bets on every value being above m, fairly if the mean is m; who ends with more than
    1 / (1 - confidence) has good reason to think that the mean is above m.
    """
    x = np.asarray(values, float)
    if not len(x):
        return 0.0
    means = np.linspace(0, 1, 1001)[1:-1]
    # Of a stake s / m the worst value, 0, leaves 1 - s of the wealth. Which stake is best depends on the values, so a
    # part of the wealth goes on each; the order of the values does not matter.
    logs = np.stack([np.log1p(fraction / means * (x[:, None] - means)).sum(axis=0) for fraction in BETTING_FRACTIONS])
    wealth = np.exp(np.minimum(logs, 100.0)).mean(axis=0)
    refuted = wealth >= 1 / (1 - confidence)
    return float(means[int(np.argmin(refuted)) - 1]) if refuted[0] else 0.0


def choose_threshold(
    estimates: NDArray[np.float64],
    dice: NDArray[np.float64],
    *,
    target: float,
    confidence: float,
    thresholds: Sequence[float] = THRESHOLD_GRID,
) -> RiskGuarantee:
    """The loosest threshold at which the accepted masks' mean Dice is at least `target` with `confidence`.

    Where there is none, the loosest at which the calibration objects' own mean reaches the target, and failing that
    the strictest that leaves a tenth of them, at least `MIN_THRESHOLD`; `kept` is False then, and `mean_lower_bound` is what can be
    promised there.
    """
    per_threshold = 1 - (1 - confidence) / len(thresholds)
    guarantees = []
    for threshold in sorted(thresholds):
        accepted = dice[estimates >= threshold]
        mean = float(accepted.mean()) if len(accepted) else math.nan
        bound = mean_lower_bound(accepted, per_threshold)
        guarantees.append(
            RiskGuarantee(threshold, bound >= target, bound, mean, len(accepted) / max(len(dice), 1), len(dice))
        )
    reaching = [guarantee for guarantee in guarantees if guarantee.kept] or [
        guarantee for guarantee in guarantees if guarantee.mean >= target
    ]
    # Where not even that holds, masks that are as likely wrong as right are not let through for want of better ones.
    careful = [guarantee for guarantee in guarantees if guarantee.threshold >= MIN_THRESHOLD]
    strict = [guarantee for guarantee in careful if guarantee.coverage >= 0.1][::-1] or careful
    choices = reaching or strict
    return choices[0]


class ThresholdFit(NamedTuple):
    """What a threshold by estimates alone lets through of the objects that it was chosen on."""

    threshold: float
    mean_estimate: float
    """Of the objects at or above it; NaN where there is none."""
    coverage: float
    """Their share."""
    num_objects: int


def threshold_for_mean_estimate(estimates: Sequence[float], target: float, otherwise: float) -> ThresholdFit:
    """The loosest threshold, not below `MIN_THRESHOLD` (or the target, where that is lower), at which the mean estimate of
    what it keeps is at least `target`; `otherwise` where even the highest estimate is below.

    Nothing is promised by it. It takes the estimates at their word, which are calibrated object by object, where a
    threshold carried over from the labeled objects takes the mixture of good and bad masks to be the same: the models
    of the parts know fewer labels, so theirs is worse, and too much would be refused.
    """
    values = np.sort(np.asarray(estimates, float))[::-1]
    floor = min(MIN_THRESHOLD, target)
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    # Estimates at a step of the staircase are equal: all of them are in, or none.
    is_last_of_ties = np.diff(values, append=-np.inf) != 0
    fits = np.nonzero((means >= target) & (values >= floor) & is_last_of_ties)[0]
    threshold = float(values[fits[-1]]) if len(fits) else otherwise
    kept = values[values >= threshold]
    mean = float(kept.mean()) if len(kept) else math.nan
    return ThresholdFit(threshold, mean, len(kept) / max(len(values), 1), len(values))


def risk_coverage(estimates: NDArray[np.float64], dice: NDArray[np.float64]) -> list[tuple[float, float]]:
    """(share accepted, their mean Dice), the most trusted first; equal estimates come together."""
    order = np.argsort(-estimates, kind="stable")
    last = np.nonzero(np.diff(estimates[order], append=-np.inf))[0]
    means = np.cumsum(dice[order]) / np.arange(1, len(dice) + 1)
    return [((int(n) + 1) / len(dice), float(means[n])) for n in last]


def reliability(
    estimates: NDArray[np.float64], dice: NDArray[np.float64], num_bins: int = 5
) -> list[tuple[float, float, int]]:
    """(mean estimate, mean Dice, count) of bins with about equally many objects."""
    order = np.argsort(estimates, kind="stable")
    bins = [members for members in np.array_split(order, min(num_bins, len(order))) if len(members)]
    return [(float(estimates[members].mean()), float(dice[members].mean()), len(members)) for members in bins]


def true_dice(mask: NDArray[np.bool_], prompts: Prompts, truth: NDArray[np.uint8]) -> float:
    """Dice of one object's mask with what it should have been.

    That is the true objects of its class that lie for at least half in the mask or in the local model's component,
    else the one that overlaps these most; with an IoU under `MIN_OVERLAP` nothing was meant, and Dice is 0.

    Args:
        mask: (H, W) of the object.
        prompts: with the component.
        truth: (H, W) class ids, 255 = ignore.
    """
    region = mask if prompts.component is None else mask | prompts.component
    components = masks.components(truth == prompts.class_id)
    matched = [
        component for component in components if 2 * np.count_nonzero(component & region) >= np.count_nonzero(component)
    ]
    if not matched:
        nearest = max(components, key=lambda component: metrics.iou(component, region), default=None)
        matched = [nearest] if nearest is not None and metrics.iou(nearest, region) >= MIN_OVERLAP else []
    if not matched:
        return 0.0
    valid = truth != IGNORE_INDEX
    target = np.any(matched, axis=0)
    return metrics.dice(target & valid, mask & valid)


def _fit(rows: NDArray[np.float64], truth: NDArray[np.float64], groups: NDArray[np.str_], seed: int) -> Calibrator:
    from sklearn.isotonic import IsotonicRegression

    folds = _folds(groups, seed)
    errors = {}
    for penalty in PENALTIES:
        out_of_fold = np.full(len(rows), truth.mean())
        for train, test in folds:
            out_of_fold[test] = linear_predictor(rows[test], _ridge(rows[train], truth[train], penalty))
        errors[penalty] = (float(((out_of_fold - truth) ** 2).mean()), out_of_fold)
    penalty = min(errors, key=lambda p: errors[p][0])
    ridge = _ridge(rows, truth, penalty)
    steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(errors[penalty][1], truth)
    knots = tuple(zip(steps.X_thresholds_.tolist(), steps.y_thresholds_.tolist(), strict=True))
    return replace(ridge, knots=knots)


def _ridge(rows: NDArray[np.float64], truth: NDArray[np.float64], penalty: float) -> Calibrator:
    finite = np.isfinite(rows)
    fill = np.array([np.median(column[ok]) if ok.any() else 0.0 for column, ok in zip(rows.T, finite.T, strict=True)])
    filled = np.where(finite, rows, fill)
    scale = filled.std(axis=0)
    x = standardised(rows, fill, scale)
    centre = x.mean(axis=0)
    weights = np.linalg.solve((x - centre).T @ (x - centre) + penalty * np.eye(x.shape[1]), (x - centre).T @ truth)
    intercept = float(truth.mean() - centre @ weights)
    return Calibrator(tuple(fill), tuple(scale), tuple(weights), intercept, ((0.0, 0.0), (1.0, 1.0)))


def _folds(groups: NDArray[np.str_], seed: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(train, test) indices of at most `FOLDS` parts, no group on both sides; none for a single group."""
    names = np.unique(groups)
    if len(names) < 2:
        return []
    order = np.random.default_rng(derive_seed(seed, "calibration")).permutation(names)
    test_groups = [order[k :: min(FOLDS, len(names))] for k in range(min(FOLDS, len(names)))]
    return [
        (np.nonzero(~np.isin(groups, held_out))[0], np.nonzero(np.isin(groups, held_out))[0])
        for held_out in test_groups
    ]
