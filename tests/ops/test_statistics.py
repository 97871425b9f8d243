"""Paired intervals and tests: by hand, and on simulated scores: coverage, and how often equals are called different."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kmine.ops.statistics import (
    SMALL_SPLIT,
    holm,
    is_fall,
    paired_change,
    paired_difference,
    score_empty_cases,
    smallest_shown,
)


def test_equal_scores_differ_by_nothing_and_a_constant_gap_is_certain():
    a = np.random.default_rng(0).random((3, 20))
    same, shifted = paired_difference(a, a, seed=0), paired_difference(a, a + 0.1, seed=0)
    assert (same.difference, same.low, same.high, same.num_pairs) == (0, 0, 0, 60)
    assert (shifted.difference, shifted.low, shifted.high) == (pytest.approx(0.1),) * 3


def test_pairs_with_a_nan_are_left_out():
    a, b = np.zeros((1, 4)), np.array([[0.2, np.nan, 0.4, 0.6]])
    found = paired_difference(a, b, seed=0)
    assert found.difference == pytest.approx(0.4) and found.num_pairs == 3
    with pytest.raises(ValueError, match="no image"):
        paired_difference(a, np.full((1, 4), np.nan), seed=0)
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(a, b[:, :3], seed=0)
    with pytest.raises(ValueError, match="and 2 groups"):
        paired_difference(a, b, seed=0, groups=["a", "b"])


def test_one_run_is_the_t_test_of_pairs():
    a, b = np.random.default_rng(0).random((2, 1, 12))
    found, expected = paired_difference(a, b, seed=0), stats.ttest_rel(b[0], a[0])
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.04), "another test, of the same question"


def test_what_all_images_share_under_a_seed_is_known_from_the_seeds_alone():
    """Without any noise but that of 3 seeds the interval is theirs: t with 2 degrees of freedom."""
    seeds = np.array([[0.01], [0.02], [0.06]])
    found = paired_difference(np.zeros((3, 40)), np.repeat(seeds, 40, axis=1), seed=0, num_flips=999)
    half = stats.t.ppf(0.975, 2) * seeds.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))
    expected = stats.ttest_1samp(seeds[:, 0], 0).pvalue
    assert found.p_value > expected > 0.15, "40 images with one and the same gap prove nothing of other seeds"


def test_slices_of_one_volume_are_one_unit():
    rng = np.random.default_rng(0)
    a, b = np.zeros((1, 6)), rng.normal(0.1, 0.1, (1, 6))
    thrice, groups = np.repeat(b, 3, axis=1), np.repeat(list("abcdef"), 3)
    whole = paired_difference(a, b, seed=0)
    copies = paired_difference(np.zeros_like(thrice), thrice, seed=0, groups=groups)
    naive = paired_difference(np.zeros_like(thrice), thrice, seed=0)
    assert copies.num_pairs == 18 and copies.p_value == whole.p_value
    assert (copies.low, copies.high) == (pytest.approx(whole.low), pytest.approx(whole.high))
    assert naive.high - naive.low < 0.7 * (whole.high - whole.low)


def test_groups_of_several_sizes_weigh_by_their_images():
    b = np.array([[0.1, 0.1, 0.1, 0.5, 0.3]])
    found = paired_difference(np.zeros((1, 5)), b, seed=0, groups=list("aaabc"))
    assert found.difference == pytest.approx(b.mean())
    # Linearised by hand: deviations of group sums, (0.3 - 3 m, 0.5 - m, 0.3 - m) * 3 / 5, m = 0.22
    spread = np.array([-0.36, 0.28, 0.08]) * 3 / 5
    half = stats.t.ppf(0.975, 2) * spread.std(ddof=1) / np.sqrt(3)
    assert found.high == pytest.approx(0.22 + half)


def test_one_group_has_neither_interval_nor_p():
    found = paired_difference(np.zeros((2, 3)), np.ones((2, 3)), seed=0, groups=["v"] * 3)
    assert found.difference == 1 and np.isnan([found.low, found.high, found.p_value]).all()


def test_the_sign_flips_of_a_few_images_by_hand():
    """Of the 8 signs of (0.1, 0.2, 0.3), 2 are as far from 0 as the data, (0.1, 0.2, -0.3) and the like are nearer."""
    found = paired_difference(np.zeros((1, 3)), np.array([[0.1, 0.2, 0.3]]), seed=0)
    assert found.p_value == pytest.approx(2 / 8, abs=0.02)
    mixed = paired_difference(np.zeros((1, 3)), np.array([[0.3, 0.2, -0.1]]), seed=0)
    assert mixed.p_value == pytest.approx(4 / 8, abs=0.02), "also 0.3 + 0.2 + 0.1, and both the other way round"
    same = paired_difference(np.ones((2, 3)), np.ones((2, 3)), seed=0)
    assert same.p_value == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; 0.04, not below 0.06
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []
    adjusted = holm([0.01, float("nan"), 0.02])
    assert np.isnan(adjusted[1]) and [adjusted[0], adjusted[2]] == pytest.approx([0.02, 0.02])


def test_silence_on_a_clean_image_is_a_right_answer():
    assert score_empty_cases(np.array([[0.5, NAN], [0.0, NAN]])).tolist() == [[0.5, 1.0], [0.0, 1.0]]


TRIALS = 1500
RUNS, IMAGES = 5, 75


def gaps(kind: str, rng: np.random.Generator, groups: int = IMAGES) -> np.ndarray:
    """(RUNS, IMAGES) of mean 0: an image does the same under all seeds, a seed to all images, and a rest."""
    large = rng.random(groups) < 0.1
    of_image = {
        "normal": rng.normal(0, 0.1, groups),
        "heavy": np.where(large, rng.normal(0, 0.35, groups), rng.normal(0, 0.04, groups)),
        "skewed": np.where(large, 0.3, 0.0) - 0.03 + rng.normal(0, 0.03, groups),
    }[kind]
    rest = rng.normal(0, 0.1, (RUNS, IMAGES)) if kind == "normal" else rng.standard_t(3, (RUNS, IMAGES)) * 0.05
    return np.repeat(of_image, IMAGES // groups) + rest


def percentile_interval(gap: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Bootstrap of seeds and images, drawn independently: what the t-interval is better than."""
    runs, images = (rng.multinomial(n, np.full(n, 1 / n), 200) for n in gap.shape)
    low, high = np.percentile(((runs @ gap) * images).sum(axis=1) / gap.size, [2.5, 97.5])
    return low, high


def coverage(kind: str, seed_sd: float, groups: int = IMAGES) -> float:
    rng = np.random.default_rng(1)
    names = None if groups == IMAGES else np.repeat(np.arange(groups), IMAGES // groups)
    hits = 0
    for _ in range(TRIALS):
        gap = gaps(kind, rng, groups) + rng.normal(0, seed_sd, (RUNS, 1))
        found = paired_difference(np.zeros_like(gap), gap + 0.02, seed=0, groups=names, num_flips=0)
        hits += found.low <= 0.02 <= found.high
    return hits / TRIALS


@pytest.mark.parametrize("seed_sd", [0.01, 0.03])
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(kind, seed_sd):
    assert 0.93 <= coverage(kind, seed_sd) <= 0.97


def test_so_it_does_where_images_come_in_groups_of_three():
    assert 0.93 <= coverage("normal", 0.01, groups=25) <= 0.97


def test_few_groups_with_skewed_gaps_are_where_it_falls_short():
    assert 0.87 <= coverage("skewed", 0.01, groups=25) <= 0.94


def test_a_percentile_bootstrap_would_be_too_narrow_for_five_seeds():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        low, high = percentile_interval(gaps("skewed", rng) + rng.normal(0, 0.03, (RUNS, 1)), rng)
        hits += low <= 0 <= high
    assert hits / 400 < 0.93


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_equal_methods_are_called_different_in_six_percent_of_tables_at_most(kind):
    rng, trials = np.random.default_rng(3), 800
    found = [
        paired_difference(np.zeros((RUNS, IMAGES)), gap, seed=n, num_flips=199)
        for n, gap in enumerate(gaps(kind, rng) + rng.normal(0, 0.02, (RUNS, 1)) for _ in range(trials))
    ]
    assert np.mean([one.p_value <= 0.05 for one in found]) <= 0.06
    naive = [
        paired_difference(np.zeros((RUNS, IMAGES)), gaps(kind, rng) + 0.06, seed=n, num_flips=199) for n in range(50)
    ]
    assert np.mean([one.p_value <= 0.05 for one in naive]) > 0.8, "and a real one is seen"


NAN = float("nan")


def test_a_change_is_the_mean_over_the_images_and_empty_answers_count_as_right():
    change = paired_change([0.5, NAN, 0.8, NAN], [0.6, 0.0, NAN, NAN])
    assert change.num_pairs == 4, "every image counts, whatever the two say"
    assert change.difference == pytest.approx((0.1 - 1.0 + 0.2 + 0.0) / 4), "a new false alarm costs 1"
    silent = paired_change([NAN, NAN], [NAN, NAN])
    assert (silent.num_pairs, silent.difference) == (2, 0.0) and not is_fall([NAN, NAN], [NAN, NAN], 0.0)
    nothing = paired_change([], [])
    assert nothing.num_pairs == 0 and np.isnan([nothing.difference, nothing.low, nothing.high]).all()
    assert not is_fall([0.5, 0.5], [0.5, 0.5], 0.0)


def test_a_change_may_be_over_groups_with_another_confidence():
    before, after, groups = [0.5, 0.5, 0.5, 0.5], [0.5, 0.7, 0.9, 0.9], ["a", "a", "b", "b"]
    change = paired_change(before, after, groups=groups, confidence=0.95)
    assert change.difference == pytest.approx(0.25)
    assert change.high - 0.25 == pytest.approx(12.7062 * 0.15, rel=1e-3), "t of 1 degree, sd of (.1, .4) by root 2"


def test_a_confidence_of_less_gives_a_narrower_interval():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 40)), rng.random((1, 40))
    wide, narrow = paired_difference(a, b, seed=0), paired_difference(a, b, seed=0, confidence=0.9)
    assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high
    change = paired_change(a[0], b[0])
    assert (change.difference, change.low, change.high) == (narrow.difference, narrow.low, narrow.high)


def few(count: int, gap: float) -> tuple[list[float], list[float]]:
    """A few images lose much, most lose or gain next to nothing; the mean change is `gap`."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.2, count)
    return [0.5] * count, list(0.5 + gap + noise - noise.mean())


def test_a_fall_is_one_beyond_noise_and_of_few_images_one_to_less_than_half():
    assert not is_fall(*few(SMALL_SPLIT - 1, -0.2), 0.01) and is_fall(*few(SMALL_SPLIT - 1, -0.26), 0.01)
    assert not is_fall([0.1], [0.04], tolerance=0.1) and is_fall([0.1], [0.04], tolerance=0.05)
    assert not is_fall(*few(SMALL_SPLIT, -0.03), 0.01) and is_fall(*few(SMALL_SPLIT, -0.2), 0.01)
    assert is_fall(*few(400, -0.03), 0.01)
    assert not is_fall(*few(400, -0.03), 0.04), "a fall beyond noise, but tolerated"
    assert not is_fall(*few(400, 0.03), 0.0)


def test_the_best_of_several_equal_validations_of_three_images_is_no_sign_of_a_fall():
    rng = np.random.default_rng(1)
    trainings = rng.normal(0.6, 0.15, (200, 6, 3)).clip(0, 1)  # trainings, validations, images: none of them falls
    best = [max(scores, key=np.mean) for scores in trainings]
    assert sum(is_fall(a, scores[-1], 0.05) for a, scores in zip(best, trainings, strict=True)) <= 2
    collapsed = [scores[-1] * 0.3 for scores in trainings]
    assert sum(is_fall(a, b, 0.05) for a, b in zip(best, collapsed, strict=True)) >= 190


def test_no_change_is_called_a_fall_about_as_often_as_the_bound_says():
    rng = np.random.default_rng(2)
    falls = sum(is_fall(rng.normal(0.7, 0.1, 30), rng.normal(0.7, 0.1, 30), tolerance=0.0) for _ in range(50))
    assert falls <= 8, "one in twenty, a little more for a bootstrap of few images"


def test_the_smallest_gain_that_can_be_shown_by_hand():
    assert smallest_shown(4, 0.2) == pytest.approx(3.1824 * 0.2 / 2, rel=1e-4), "t of 3 degrees"
    assert smallest_shown(1) == np.inf and smallest_shown(0) == np.inf
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 0.2, (1, 16))
    found = paired_difference(np.zeros((1, 16)), gaps, seed=0, num_flips=0)
    assert found.high - found.difference == pytest.approx(smallest_shown(16, gaps.std(ddof=1)))
