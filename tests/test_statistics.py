"""Paired intervals: by hand, and their coverage on simulated scores."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.statistics import SMALL_SPLIT, is_fall, paired_change, paired_difference


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


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        a = rng.normal(0.7, 0.1, (1, 100))
        b = a + rng.normal(0.02, 0.08, (1, 100))
        found = paired_difference(a, b, seed=trial, num_resamples=400)
        hits += found.low <= 0.02 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


NAN = float("nan")


def test_a_change_is_the_mean_over_the_images_and_empty_answers_count_as_right():
    change = paired_change([0.5, NAN, 0.8, NAN], [0.6, 0.0, NAN, NAN])
    assert change.num_pairs == 3, "empty on both sides: nothing to compare"
    assert change.difference == pytest.approx((0.1 - 1.0 + 0.2) / 3), "a new false alarm costs 1"
    nothing = paired_change([NAN, NAN], [NAN, NAN])
    assert nothing.num_pairs == 0 and np.isnan([nothing.difference, nothing.low, nothing.high]).all()
    assert not is_fall(nothing, 0.0)
    assert paired_change([], []).num_pairs == 0


def test_a_confidence_of_less_gives_a_narrower_interval():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 40)), rng.random((1, 40))
    wide, narrow = paired_difference(a, b, seed=0), paired_difference(a, b, seed=0, confidence=0.9)
    assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high
    assert paired_change(a[0], b[0]) == narrow


def few(count: int, gap: float) -> tuple[list[float], list[float]]:
    """A few images lose much, most lose or gain next to nothing; the mean change is `gap`."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.2, count)
    return [0.5] * count, list(0.5 + gap + noise - noise.mean())


def test_in_a_small_split_the_mean_decides_and_in_a_larger_one_noise_is_let_pass():
    small, large, sure = (paired_change(*few(n, -0.03)) for n in (SMALL_SPLIT - 1, SMALL_SPLIT, 400))
    assert small.high > 0 and is_fall(small, 0.01) and not is_fall(small, 0.04)
    assert large.high > 0 and not is_fall(large, 0.01)
    assert sure.high < 0 and is_fall(sure, 0.01)
    assert not is_fall(sure, 0.04), "a fall beyond noise, but tolerated"
    assert not is_fall(paired_change(*few(400, 0.03)), 0.0)


def test_no_change_is_called_a_fall_about_as_often_as_the_bound_says():
    rng = np.random.default_rng(2)
    falls = sum(
        is_fall(paired_change(rng.normal(0.7, 0.1, 30), rng.normal(0.7, 0.1, 30)), tolerance=0.0) for _ in range(50)
    )
    assert falls <= 8, "one in twenty, a little more for a bootstrap of few images"
