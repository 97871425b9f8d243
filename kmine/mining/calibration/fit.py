"""Fit the gate's calibrator (evidence -> estimated Dice) and bound the mean Dice of the accepted masks.

The calibrators are fitted on objects of labeled images on which neither the local model nor the segmenter was trained:
their evidence and the true Dice of their masks. Each is a ridge regression; an isotonic regression of its out-of-fold
predictions follows; a few dozen objects do not support more.

The gate has two: one of the mean Dice of the two masks of an object, one of their difference. Two masks of one object
share what makes it hard, so the mean is less noisy than either, and the difference is lost in two separate regressions.

The guarantee is a lower bound of the mean Dice of accepted masks, by betting (Waudby-Smith and Ramdas 2024, "Estimating
means of bounded random variables by betting"; here a mixture of constant stakes). It holds with the stated confidence
for objects drawn like the labeled ones, whatever their distribution, given thresholds fixed beforehand and out-of-fold
estimates. Several thresholds share the error (Bonferroni), as in Learn then Test (Angelopoulos et al. 2021).

Letters: N objects, F features, H and W of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.ops import masks, metrics
from kmine.ops.calibrator import (
    Calibrator,
    RiskGuarantee,
    feature_rows,
    linear_predictor,
    standardised,
    used_estimates,
    used_sides,
)
from kmine.ops.seeding import derive_seed
from kmine.types import IGNORE_INDEX, Bool, Evidence, Floats, Prompts

THRESHOLD_GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of estimated Dice, fixed before any data is seen; the lowest one with a guarantee is chosen."""
MIN_THRESHOLD = 0.5
"""Lowest threshold of estimated Dice unless the target is lower or guaranteed."""
MIN_OBJECTS = 20
"""With fewer objects nothing is fitted: their ranking by the evidence is safer then."""
MIN_OVERLAP = 0.1
"""IoU with a true object from which on a mask or component is matched to it."""
FOLDS = 5
PENALTIES = tuple(10.0**k for k in range(-1, 4))
"""Ridge penalties; the one with the smallest out-of-fold error is chosen."""
BETTING_FRACTIONS = tuple(k / 20 for k in range(1, 20))
"""Shares of the wealth that the mixed bettors stake."""


class FittedCalibrator(NamedTuple):
    """A calibrator and its unbiased estimates of the objects that it was fitted on."""

    calibrator: Calibrator
    out_of_fold: Floats
    """(N,) estimates of calibrators fitted without the object's group."""


def fit_calibrator(
    evidence: Sequence[Evidence], dice: Sequence[float] | Floats, groups: Sequence[str], *, seed: int
) -> FittedCalibrator | None:
    """Fit a calibrator; None with fewer than `MIN_OBJECTS` objects or two groups.

    `evidence`, true `dice` and `groups` (patients, volumes, near duplicates) are those of N objects, on whose images no
    model of the pipeline was trained. `seed` assigns groups to folds.
    """
    rows, truth, names = feature_rows(evidence), np.asarray(dice, float), np.asarray(groups)
    if len(rows) < MIN_OBJECTS or len(set(groups)) < 2:
        return None
    out_of_fold = np.full(len(rows), np.nan)
    for train, test in _folds(names, seed):
        out_of_fold[test] = _fit(rows[train], truth[train], names[train], seed).estimates(rows[test])
    return FittedCalibrator(_fit(rows, truth, names, seed), out_of_fold)


class FittedGate(NamedTuple):
    """The two calibrators of the gate, and their unbiased estimates of the objects that they were fitted on."""

    quality: Calibrator
    difference: Calibrator
    estimates: Floats
    """(N,) estimated Dice of the mask that is used, by calibrators fitted without the object's group."""
    differences: Floats
    """(N,) estimated Dice of the segmenter's minus that of the local model's mask, likewise."""
    sides: Floats
    """(N,) which mask is used: `used_sides`."""


def fit_gate(
    evidence: Sequence[Evidence], dice: tuple[Floats, Floats], groups: Sequence[str], *, margin: float, seed: int
) -> FittedGate | None:
    """Fit the calibrators of the gate; None as in `fit_calibrator`, whose arguments these are.

    `dice`: (N,) true Dice of the segmenter's masks, and of the local model's.
    """
    rows, names = feature_rows(evidence), np.asarray(groups)
    if len(rows) < MIN_OBJECTS or len(set(groups)) < 2:
        return None
    out_of_fold = np.full((3, len(rows)), np.nan)
    for train, test in _folds(names, seed):
        fitted = _fit_pair(rows[train], (dice[0][train], dice[1][train]), names[train], margin, seed)
        out_of_fold[:, test] = used_estimates(rows[test], *fitted, margin)
    return FittedGate(*_fit_pair(rows, dice, names, margin, seed), *out_of_fold)


def _fit_pair(
    rows: Floats, dice: tuple[Floats, Floats], groups: NDArray[np.str_], margin: float, seed: int
) -> tuple[Calibrator, Calibrator]:
    """Calibrators of quality and of the difference; the map of the first is fitted to the masks that would be used."""
    segmenter, local = dice
    has_local = used_sides(rows, segmenter, 0.0) != 0
    fitted = has_local if has_local.any() else ~has_local
    differences = np.zeros(len(rows))
    difference, differences[fitted] = _cross_fitted(rows[fitted], (segmenter - local)[fitted], groups[fitted], seed)
    quality, means = _cross_fitted(rows, np.where(has_local, (segmenter + local) / 2, segmenter), groups, seed)
    sides = used_sides(rows, differences, margin)
    used = np.where(sides < 0, local, segmenter)
    return replace(quality, knots=_isotonic(means + sides * differences / 2, used)), difference


def mean_lower_bound(values: Sequence[float] | Floats, confidence: float) -> float:
    """Lower bound of the mean of [0, 1] values that holds with `confidence`; 0 without values.

    For each m, a bettor with wealth 1 bets that values exceed m; the bets are fair if the mean is m. A final wealth of
    1 / (1 - confidence) or more therefore refutes that m.
    """
    x = np.asarray(values, float)
    if not len(x):
        return 0.0
    means = np.linspace(0, 1, 1001)[1:-1]
    # With a stake of s / m the worst value, 0, leaves 1 - s of the wealth. The best stake depends on the values, so the
    # wealth is split over all of them; the order of the values does not matter.
    logs = np.stack([np.log1p(fraction / means * (x[:, None] - means)).sum(axis=0) for fraction in BETTING_FRACTIONS])
    wealth = np.exp(np.minimum(logs, 100.0)).mean(axis=0)
    refuted = wealth >= 1 / (1 - confidence)
    return float(means[int(np.argmin(refuted)) - 1]) if refuted[0] else 0.0


def choose_threshold(
    estimates: Floats, dice: Floats, *, target: float, confidence: float, thresholds: Sequence[float] = THRESHOLD_GRID
) -> RiskGuarantee:
    """Choose the lowest threshold at which the mean Dice of accepted masks is at least `target` with `confidence`.

    Without one, `holds` is False and `lower_bound` is what is guaranteed instead. The threshold is then the lowest at
    which the calibration objects' own mean reaches the target. Failing that, it is the highest from `MIN_THRESHOLD` on
    that keeps a tenth of them.
    """
    per_threshold = 1 - (1 - confidence) / len(thresholds)
    guarantees = []
    for threshold in sorted(thresholds):
        accepted = dice[estimates >= threshold]
        mean = float(accepted.mean()) if len(accepted) else math.nan
        bound, coverage = mean_lower_bound(accepted, per_threshold), len(accepted) / max(len(dice), 1)
        guarantees.append(RiskGuarantee(threshold, bound >= target, bound, mean, coverage, len(dice)))
    guaranteed = [guarantee for guarantee in guarantees if guarantee.holds]
    reaching = [guarantee for guarantee in guarantees if guarantee.mean >= target]
    # Below `MIN_THRESHOLD` masks are as likely wrong as right: none are kept merely for lack of better ones.
    careful = [guarantee for guarantee in guarantees if guarantee.threshold >= MIN_THRESHOLD]
    strict = [guarantee for guarantee in careful if guarantee.coverage >= 0.1][::-1] or careful
    return (guaranteed or reaching or strict)[0]


class ThresholdFit(NamedTuple):
    """A threshold chosen by estimates only, and the objects at or above it."""

    threshold: float
    mean_estimate: float
    """Mean estimate of these objects; NaN without any."""
    coverage: float
    """Their share of all."""
    num_objects: int
    """All objects."""


def threshold_for_mean_estimate(estimates: Sequence[float], target: float, otherwise: float) -> ThresholdFit:
    """Lowest threshold at which the mean estimate of the objects kept is at least `target`; else `otherwise`.

    It is not below `MIN_THRESHOLD`, or below the target where that is lower. No guarantee: it assumes calibrated
    estimates. Unlike a threshold carried over from the labeled objects it adapts to the share of good masks, which is
    lower for the fold models, as they are trained on fewer labels.
    """
    values = np.sort(np.asarray(estimates, float))[::-1]
    floor = min(MIN_THRESHOLD, target)
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    # Isotonic regression gives many objects the same estimate: these are kept or dropped together.
    is_last_of_ties = np.diff(values, append=-np.inf) != 0
    fits = np.nonzero((means >= target) & (values >= floor) & is_last_of_ties)[0]
    threshold = float(values[fits[-1]]) if len(fits) else otherwise
    kept = values[values >= threshold]
    mean = float(kept.mean()) if len(kept) else math.nan
    return ThresholdFit(threshold, mean, len(kept) / max(len(values), 1), len(values))


def risk_coverage(estimates: Floats, dice: Floats) -> list[tuple[float, float]]:
    """(share accepted, their mean Dice) in order of falling estimates; objects with equal estimates count together."""
    order = np.argsort(-estimates, kind="stable")
    last = np.nonzero(np.diff(estimates[order], append=-np.inf))[0]
    means = np.cumsum(dice[order]) / np.arange(1, len(dice) + 1)
    return [((int(n) + 1) / len(dice), float(means[n])) for n in last]


def reliability(estimates: Floats, dice: Floats, num_bins: int = 5) -> list[tuple[float, float, int]]:
    """(mean estimate, mean Dice, count) of bins with about equally many objects."""
    order = np.argsort(estimates, kind="stable")
    bins = [members for members in np.array_split(order, min(num_bins, len(order))) if len(members)]
    return [(float(estimates[members].mean()), float(dice[members].mean()), len(members)) for members in bins]


def true_dice(mask: Bool, prompts: Prompts, truth: NDArray[np.uint8]) -> float:
    """Dice of one object's mask with the true objects that it covers, without ignored pixels; never NaN.

    These are the true objects of its class with at least half of their area in the mask or the local model's component,
    else the one with the highest IoU with that region. Below `MIN_OVERLAP` none is matched, and Dice is 0. `mask` is
    (H, W), `truth` (H, W) class ids with 255 = ignore.
    """
    region = mask if prompts.component is None else mask | prompts.component
    components = masks.components(truth == prompts.class_id)
    matched = [c for c in components if 2 * np.count_nonzero(c & region) >= np.count_nonzero(c)]
    if not matched:
        nearest = max(components, key=lambda component: metrics.iou(component, region), default=None)
        matched = [nearest] if nearest is not None and metrics.iou(nearest, region) >= MIN_OVERLAP else []
    if not matched:
        return 0.0
    valid = truth != IGNORE_INDEX
    return metrics.dice(np.any(matched, axis=0) & valid, mask & valid)


def rank_correlation(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else math.nan


def _fit(rows: Floats, truth: Floats, groups: NDArray[np.str_], seed: int) -> Calibrator:
    calibrator, out_of_fold = _cross_fitted(rows, truth, groups, seed)
    return replace(calibrator, knots=_isotonic(out_of_fold, truth))


def _cross_fitted(rows: Floats, truth: Floats, groups: NDArray[np.str_], seed: int) -> tuple[Calibrator, Floats]:
    """The ridge regression of the best of `PENALTIES`, and its (N,) out-of-fold predictions."""
    folds = _folds(groups, seed)
    errors = {}
    for penalty in PENALTIES:
        out_of_fold = np.full(len(rows), truth.mean())
        for train, test in folds:
            out_of_fold[test] = linear_predictor(rows[test], _ridge(rows[train], truth[train], penalty))
        errors[penalty] = (float(((out_of_fold - truth) ** 2).mean()), out_of_fold)
    penalty = min(errors, key=lambda p: errors[p][0])
    return _ridge(rows, truth, penalty), errors[penalty][1]


def _isotonic(predictions: Floats, truth: Floats) -> tuple[tuple[float, float], ...]:
    """Knots of a non-decreasing map from predictions to true Dice."""
    from sklearn.isotonic import IsotonicRegression

    isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(predictions, truth)
    return tuple(zip(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist(), strict=True))


def _ridge(rows: Floats, truth: Floats, penalty: float) -> Calibrator:
    """Ridge regression of (N,) Dice on (N, F) features; its isotonic map is the identity."""
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
    """(train, test) indices of at most `FOLDS` folds with no group on both sides; none for a single group."""
    names = np.unique(groups)
    if len(names) < 2:
        return []
    order = np.random.default_rng(derive_seed(seed, "calibration")).permutation(names)
    count = min(FOLDS, len(names))
    in_test = [np.isin(groups, order[k::count]) for k in range(count)]
    return [(np.nonzero(~test)[0], np.nonzero(test)[0]) for test in in_test]
