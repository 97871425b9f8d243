"""Paired intervals: by hand, and their coverage on simulated scores."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.statistics import paired_difference


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
