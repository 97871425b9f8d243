"""Greedy facility location: cases done by hand."""

from __future__ import annotations

import numpy as np

from kmine.ops.coverage import SHORTLIST, choose_covering


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


CLUSTERS = on_circle(0, 5, -5, 180, 175, 185)
"""Two opposite clusters of three, whose mean is at the centre."""


def test_one_of_each_cluster_is_chosen_and_stands_for_it():
    chosen = choose_covering(np.ones(6), CLUSTERS, [*"abcdef"], 2)
    assert chosen == [(0, 3), (3, 3)], "the middles of the clusters"


def test_the_cluster_of_the_higher_weights_comes_first():
    weights = np.array([0.5, 0.5, 0.5, 0.9, 0.9, 0.9])
    assert [n for n, _ in choose_covering(weights, CLUSTERS, [*"abcdef"], 2)] == [3, 0]


def test_a_group_counts_as_one_by_its_item_of_the_highest_weight():
    weights = np.array([0.5, 0.6, 0.5, 0.9, 0.9, 0.8])
    chosen = choose_covering(weights, CLUSTERS, [*"xxxyyy"], 6)
    assert sorted(n for n, _ in chosen) == [1, 3], "of equal weights the first"
    assert sum(number for _, number in chosen) == 6


def test_the_short_list_is_of_the_groups_with_the_highest_weights():
    weights = np.array([1.0, 0.2, *[0.9] * SHORTLIST])
    groups = ["a", "a", *(f"b{n}" for n in range(SHORTLIST))]
    features = np.random.default_rng(0).normal(size=(len(weights), 4))
    features[0] = -features[2:].sum(axis=0)  # far from all others, but first by weight
    assert choose_covering(np.where(weights < 1, 0, 1), features, groups, 1)[0][0] == 0


def test_items_of_low_weight_are_covered_but_not_chosen():
    count = 2
    weights = np.array([1.0] * SHORTLIST * count + [0.1] * 20)
    features = np.random.default_rng(0).normal(size=(len(weights), 4))
    chosen = [n for n, _ in choose_covering(weights, features, [str(n) for n in range(len(weights))], count)]
    assert len(set(chosen)) == count and max(chosen) < SHORTLIST * count


def test_items_without_features_of_their_own_are_chosen_all_the_same():
    assert [n for n, _ in choose_covering(np.array([0.2, 0.7]), np.zeros((2, 3)), ["a", "b"], 2)] == [1, 0]
    assert choose_covering(np.array([0.2]), np.zeros((1, 3)), ["a"], 1) == [(0, 1)]
