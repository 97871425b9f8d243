"""The fitted calibrator and the guarantee: laws, hand-computed cases, simulations with a known result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kmine.mining.calibration.fit import (
    MIN_OBJECTS,
    choose_threshold,
    fit_calibrator,
    fit_gate,
    mean_lower_bound,
    rank_correlation,
    reliability,
    risk_coverage,
    threshold_for_mean_estimate,
    true_dice,
)
from kmine.ops.calibrator import FEATURES, feature_rows, used_estimates
from kmine.types import Evidence, Prompts


def objects(count: int, seed: int = 0, noise: float = 0.05) -> tuple[list[Evidence], np.ndarray, list[str]]:
    """Objects whose Dice is their agreement plus noise; predicted IoU is random, other scores are missing."""
    rng = np.random.default_rng(seed)
    agreement = rng.uniform(0.2, 1, count)
    dice = np.clip(agreement + rng.normal(0, noise, count), 0, 1)
    evidence = [Evidence(predicted_iou=rng.random(), agreement_iou=a) for a in agreement]
    return evidence, dice, [f"group{n // 2}" for n in range(count)]


# -- the calibrator


def test_the_informative_score_gets_the_weight():
    evidence, dice, groups = objects(60)
    calibrator, _ = fit_calibrator(evidence, dice, groups, seed=0)
    weights = dict(zip(FEATURES, calibrator.weights, strict=True))
    assert weights["agreement_iou"] > 5 * abs(weights["predicted_iou"]) > 0
    assert all(weights[name] == 0 for name in FEATURES if name not in ("agreement_iou", "predicted_iou"))
    new, truth, _ = objects(200, seed=1)
    estimates = calibrator.estimates(feature_rows(new))
    assert abs((estimates - truth).mean()) < 0.03
    assert np.corrcoef(estimates, truth)[0, 1] > 0.9


def test_a_missing_score_counts_as_the_median():
    evidence, dice, groups = objects(60)
    calibrator, _ = fit_calibrator(evidence, dice, groups, seed=0)
    usual = float(np.median([e.agreement_iou for e in evidence]))
    middle = float(np.median([e.predicted_iou for e in evidence]))
    assert calibrator.estimate(Evidence()) == pytest.approx(
        calibrator.estimate(Evidence(agreement_iou=usual, predicted_iou=middle))
    )


def test_out_of_fold_estimates_do_not_depend_on_their_own_group():
    evidence, dice, groups = objects(40)
    _, before = fit_calibrator(evidence, dice, groups, seed=0)
    changed = dice.copy()
    changed[:2] = 0.0  # both objects of group0
    _, after = fit_calibrator(evidence, changed, groups, seed=0)
    assert np.array_equal(before[:2], after[:2])
    assert not np.array_equal(before[2:], after[2:])


def test_too_few_objects_or_a_single_group_give_no_calibrator():
    evidence, dice, groups = objects(MIN_OBJECTS)
    assert fit_calibrator(evidence, dice, groups, seed=0) is not None
    assert fit_calibrator(evidence[1:], dice[1:], groups[1:], seed=0) is None
    assert fit_calibrator(evidence, dice, ["one"] * MIN_OBJECTS, seed=0) is None


def test_constant_evidence_gives_the_mean():
    dice = np.linspace(0.5, 0.9, 20)
    calibrator, out_of_fold = fit_calibrator(
        [Evidence(predicted_iou=0.5)] * 20, dice, [str(n) for n in range(20)], seed=0
    )
    assert calibrator.estimate(Evidence(predicted_iou=0.9)) == pytest.approx(dice.mean())
    assert np.allclose(out_of_fold, dice.mean(), atol=0.05)


# -- the gate's two calibrators


def pairs(count: int, seed: int = 0) -> tuple[list[Evidence], tuple[np.ndarray, np.ndarray], list[str]]:
    """Objects as difficult as their confidence says; the segmenter is better where the predicted IoU is above .5."""
    rng = np.random.default_rng(seed)
    ease, iou = rng.uniform(0.4, 0.8, count), rng.random(count)
    shared = ease + rng.normal(0, 0.15, count)
    dice = tuple(np.clip(shared + side * 0.2 * (iou - 0.5), 0, 1) for side in (1, -1))
    evidence = [
        Evidence(predicted_iou=i, confidence_inside=e, agreement_iou=0.5) for i, e in zip(iou, ease, strict=True)
    ]
    return evidence, dice, [f"group{n // 2}" for n in range(count)]


def test_the_difference_is_estimated_where_it_is_small_beside_what_two_masks_share():
    evidence, dice, groups = pairs(120)
    fitted = fit_gate(evidence, dice, groups, margin=0.03, seed=0)
    two = [fit_calibrator(evidence, values, groups, seed=0).out_of_fold for values in dice]
    difference = dice[0] - dice[1]
    assert rank_correlation(fitted.differences, difference) > rank_correlation(two[0] - two[1], difference) + 0.05
    assert set(fitted.sides) == {-1.0, 1.0}
    better = np.where(fitted.sides < 0, dice[1], dice[0])
    assert better.mean() > max(values.mean() for values in dice) + 0.03


def test_the_estimate_is_calibrated_for_the_mask_that_is_used():
    fitted = fit_gate(*pairs(200), margin=0.03, seed=0)
    evidence, dice, _ = pairs(400, seed=1)
    found = used_estimates(feature_rows(evidence), fitted.quality, fitted.difference, 0.03)
    used = np.where(found[2] < 0, dice[1], dice[0])
    assert abs((found[0] - used).mean()) < 0.02
    assert all(abs(estimate - truth) < 0.08 for estimate, truth, _ in reliability(found[0], used))


def test_estimates_of_the_gate_do_not_depend_on_their_own_group():
    evidence, dice, groups = pairs(40)
    before = fit_gate(evidence, dice, groups, margin=0.03, seed=0)
    changed = tuple(np.concatenate([[0.0, 0.0], values[2:]]) for values in dice)
    after = fit_gate(evidence, changed, groups, margin=0.03, seed=0)
    for name in ("estimates", "differences", "sides"):
        assert np.array_equal(getattr(before, name)[:2], getattr(after, name)[:2])
    assert not np.array_equal(before.estimates[2:], after.estimates[2:])


def test_where_the_local_model_has_no_mask_the_segmenters_is_used_and_no_difference_learned():
    evidence, dice, groups = pairs(60)
    without = [replace(e, agreement_iou=np.nan) if n % 2 else e for n, e in enumerate(evidence)]
    alone = dice[0], np.where(np.arange(60) % 2, 0.0, dice[1])
    fitted = fit_gate(without, alone, groups, margin=0.03, seed=0)
    assert (fitted.sides[1::2] == 0).all() and (fitted.sides[::2] != 0).all()
    assert abs(fitted.differences[::2].mean() - (dice[0] - dice[1])[::2].mean()) < 0.05
    only = fit_gate([replace(e, agreement_iou=np.nan) for e in evidence], dice, groups, margin=0.03, seed=0)
    assert (only.sides == 0).all()
    assert (
        fit_gate(
            evidence[: MIN_OBJECTS - 1],
            tuple(d[: MIN_OBJECTS - 1] for d in dice),
            groups[: MIN_OBJECTS - 1],
            margin=0.03,
            seed=0,
        )
        is None
    )


# -- the threshold by estimates only


@pytest.mark.parametrize(
    ("estimates", "target", "threshold", "coverage"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.2], 0.8, 0.7, 3 / 5),  # means .9 .85 .8 .75
        ([0.6, 0.9, 0.2, 0.8, 0.7], 0.75, 0.6, 4 / 5),
        ([0.9, 0.7, 0.7, 0.7], 0.76, 0.9, 1 / 4),  # equal ones count together: .9, then .75
        ([1.0, 1.0, 1.0, 0.4], 0.8, 1.0, 3 / 4),  # .85 with the last, but it is more likely wrong than right
        ([1.0, 1.0, 0.35, 0.2], 0.3, 0.35, 3 / 4),  # unless the target is that low
        ([0.5, 0.4], 0.8, 0.95, 0.0),  # out of reach: `otherwise`
        ([], 0.8, 0.95, 0.0),
    ],
)
def test_the_lowest_threshold_whose_mean_estimate_reaches_the_target(estimates, target, threshold, coverage):
    fit = threshold_for_mean_estimate(estimates, target, 0.95)
    assert fit.threshold == pytest.approx(threshold)
    assert fit.coverage == pytest.approx(coverage) and fit.num_objects == len(estimates)
    kept = [value for value in estimates if value >= threshold]
    assert fit.mean_estimate == pytest.approx(np.mean(kept)) if kept else np.isnan(fit.mean_estimate)


# -- the guarantee


def test_lower_bound_by_hand():
    assert mean_lower_bound([], 0.9) == 0
    assert mean_lower_bound([0.0] * 30, 0.9) == 0
    # One value of 1 and stakes up to 95 %: the wealth is the mean of 1 + s (1 / m - 1), 10 at m = .5 / 9.5.
    assert mean_lower_bound([1.0], 0.9) == pytest.approx(0.5 / 9.5, abs=1e-3)


def test_lower_bound_grows_with_the_values_and_falls_with_confidence():
    values = np.random.default_rng(0).beta(8, 2, 40)
    assert mean_lower_bound(values, 0.9) < values.mean()
    assert mean_lower_bound(np.minimum(values + 0.1, 1), 0.9) > mean_lower_bound(values, 0.9)
    assert mean_lower_bound(values, 0.99) < mean_lower_bound(values, 0.9)
    assert mean_lower_bound(np.tile(values, 4), 0.9) > mean_lower_bound(values, 0.9)
    assert mean_lower_bound(values[::-1], 0.9) == mean_lower_bound(values, 0.9)


@pytest.mark.parametrize("shape", ["beta", "rare zeros", "coins"])
def test_the_bound_exceeds_the_mean_in_at_most_the_stated_share(shape):
    rng, wrong, runs = np.random.default_rng(1), 0, 200
    for _ in range(runs):
        if shape == "beta":
            values, mean = rng.beta(2, 1, 25), 2 / 3
        elif shape == "coins":
            values, mean = (rng.random(25) < 0.6) * 1.0, 0.6
        else:
            values, mean = np.where(rng.random(25) < 0.1, 0, 0.9), 0.81
        wrong += mean_lower_bound(values, 0.8) > mean
    assert wrong / runs <= 0.2


def test_the_guarantee_fails_in_at_most_the_stated_share():
    broken, runs = 0, 100
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        score = rng.random(80)
        dice = np.where(rng.random(80) < 0.3 + 0.7 * score, rng.beta(20, 2, 80), 0.3)
        fit = choose_threshold(score, dice, target=0.75, confidence=0.8)
        if fit.holds:
            fresh = rng.uniform(fit.threshold, 1, 4000)
            good = rng.random(4000) < 0.3 + 0.7 * fresh
            broken += np.where(good, 20 / 22, 0.3).mean() < 0.75
    assert broken / runs <= 0.2


def test_the_lowest_threshold_with_a_guarantee_is_chosen():
    estimates = np.repeat([0.95, 0.75, 0.3], [100, 100, 100])
    dice = np.repeat([0.95, 0.85, 0.2], [100, 100, 100])
    fit = choose_threshold(estimates, dice, target=0.8, confidence=0.9)
    assert fit.holds and fit.threshold == 0.5 and fit.coverage == pytest.approx(2 / 3)
    assert fit.mean == pytest.approx(0.9) and 0.8 <= fit.lower_bound < 0.9
    assert choose_threshold(estimates, dice, target=0.5, confidence=0.9).threshold == 0


def test_without_a_guarantee_the_bound_is_below_the_target():
    estimates, dice = np.repeat([0.95, 0.4], [6, 14]), np.repeat([0.95, 0.4], [6, 14])
    fit = choose_threshold(estimates, dice, target=0.9, confidence=0.9)
    assert not fit.holds and fit.threshold == 0.5 and fit.mean == pytest.approx(0.95)
    assert 0 < fit.lower_bound < 0.9
    hopeless = choose_threshold(estimates, dice / 2, target=0.9, confidence=0.9)
    assert not hopeless.holds and hopeless.threshold == 0.9


def test_bad_masks_are_not_kept_for_lack_of_better_ones():
    poor = choose_threshold(np.full(20, 0.3), np.full(20, 0.3), target=0.85, confidence=0.9)
    assert not poor.holds and poor.threshold == 0.5 and poor.coverage == 0 and poor.lower_bound == 0


# -- curves


def test_risk_coverage_by_hand():
    curve = risk_coverage(np.array([0.2, 0.9, 0.9, 0.5]), np.array([0.1, 1.0, 0.8, 0.6]))
    assert curve == [(0.5, pytest.approx(0.9)), (0.75, pytest.approx(0.8)), (1.0, pytest.approx(0.625))]


def test_reliability_by_hand():
    bins = reliability(np.array([0.1, 0.9, 0.3, 0.7]), np.array([0.0, 1.0, 0.4, 0.5]), num_bins=2)
    assert bins == [
        (pytest.approx(0.2), pytest.approx(0.2), 2),
        (pytest.approx(0.8), pytest.approx(0.75), 2),
    ]


# -- true Dice


def test_true_dice_is_taken_with_the_matched_objects():
    truth = np.zeros((20, 20), np.uint8)
    truth[2:6, 2:6] = truth[2:6, 8:12] = 1
    truth[15:19, 15:19] = 2
    one, both = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    one[2:6, 2:6] = True
    both[2:6, 2:12] = True
    prompts = Prompts(1, component=one)
    assert true_dice(one, prompts, truth) == 1
    assert true_dice(both, prompts, truth) == pytest.approx(2 * 32 / (32 + 40))
    assert true_dice(one, Prompts(2, component=one), truth) == 0
    assert true_dice(np.zeros_like(one), Prompts(1, component=one), truth) == 0
    far = np.zeros((20, 20), bool)
    far[15:19, 2:6] = True
    assert true_dice(far, Prompts(1, component=far), truth) == 0
    truth[2:6, 2:4] = 255
    assert true_dice(one, prompts, truth) == 1


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([0.1, 0.2, 0.3, 0.9], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
