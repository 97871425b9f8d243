"""Ranking of masks: which models score a mask, outliers, ranks, their weighted mean, explanations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmine.audit.label_issues import ConfidentDisagreement
from kmine.audit.ranking import (
    WEIGHTS,
    ReferenceModel,
    contradicts_image_label,
    explanations,
    held_out_models,
    label_issue_scores,
    outliers,
    rank_order,
    ranks,
    shape_features,
    uncertainty_of,
)
from kmine.store.tables import DecisionRow
from kmine.types import Evidence

NONE = frozenset()


def test_only_held_out_models_score_a_mask():
    fold = ReferenceModel("fold_0", frozenset({"label a"}), NONE)
    first = ReferenceModel("round_00", frozenset({"label a", "label b"}), frozenset({1}))
    second = ReferenceModel("round_01", frozenset({"label a", "label b", "x"}), frozenset({2}))
    models = [fold, first, second]
    assert held_out_models(models, "x", 1) == [0]  # round 0 prompted in round 1, round 1 was trained on x
    assert held_out_models(models, "x", 2) == [0, 1]
    assert held_out_models(models, "y", 2) == [0, 1]  # round 1 was not trained on y, but prompted in round 2
    assert held_out_models(models, "y", 3) == [0, 1, 2]
    assert held_out_models([first], "x", 1) == [0]  # the only model is the fallback
    assert held_out_models(models, "label b", 0) == [0]
    assert held_out_models(models, "label a", 0) == []


def test_the_worst_object_counts_and_unknown_scores_do_not():
    scores = Evidence(agreement_iou=0.8, jitter_dice=1.0), Evidence(agreement_iou=0.2, jitter_dice=0.6, tta_std=0.3)
    good, bad = (
        DecisionRow("a", n, 1, True, "kept", evidence=evidence, estimated_dice=estimate)
        for n, evidence, estimate in zip((0, 1), scores, (0.9, 0.5), strict=True)
    )
    found = uncertainty_of([good, bad])
    assert found["doubt"] == pytest.approx(0.5)
    assert found["disagreement"] == pytest.approx((0.8 + 0.4 + 0.3) / 3)
    assert all(math.isnan(value) for value in uncertainty_of([]).values())


def test_shape_features_by_hand():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:4, 5:15] = 1
    area, x, y, length, roughness, parts = shape_features(mask)
    assert area == pytest.approx(math.log(20 / 200))
    assert (x, y) == pytest.approx((9.5 / 20, 2.5 / 10))
    # Variance of n pixels in a row, with their own extent: n^2 / 12.
    assert length == pytest.approx(math.log(10 / 2))
    assert roughness > 0.2 and parts == 0
    assert all(math.isnan(value) for value in shape_features(np.full((4, 4), 255, np.uint8)))


def test_outliers_are_found_and_the_largest_score_over_references_counts():
    rng = np.random.default_rng(0)
    usual = rng.normal(0, 1, (50, 6))
    shapes = np.vstack([usual[:10], np.array([[8, 0, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0], [np.nan] * 6])])
    found = outliers(shapes, shapes, usual)
    assert int(np.nanargmax(found["area"])) == 10 and int(np.nanargmax(found["position"])) == 11
    assert all(math.isnan(found[name][12]) for name in found)
    one = outliers(shapes, shapes)
    assert (found["area"][:12] >= one["area"][:12]).all()


@pytest.mark.parametrize(
    ("mask", "label", "wrong"),
    [
        ([0, 1], 0, True),
        ([0, 0], 0, False),
        ([0, 0], 1, True),
        ([0, 1], 1, False),
        ([0, 255], 1, False),
        ([0, 1], None, False),
    ],
)
def test_masks_that_contradict_the_image_level_label(mask, label, wrong):
    assert contradicts_image_label(np.array([mask], np.uint8), label, 2) is wrong


@given(st.lists(st.one_of(st.integers(0, 5).map(float), st.just(math.nan)), max_size=20))
def test_ranks_keep_the_order_and_nan_ranks_in_the_middle(values):
    found = ranks(values)
    for a, b in zip(values, found, strict=True):
        assert 0 < b < 1 and (not math.isnan(a) or b == 0.5)
    known = [(a, b) for a, b in zip(values, found, strict=True) if not math.isnan(a)]
    assert all((a < c) == (b < d) for a, b in known for c, d in known)


def test_a_score_is_the_weighted_mean_of_ranks_and_1_for_a_contradiction():
    signals = {"conflict": np.array([0.0, 1.0, 0.0]), "edge": np.array([1.0, 0.0, 0.5]), "doubt": np.full(3, np.nan)}
    weights = {"conflict": 2.0, "edge": 1.0, "doubt": 5.0}  # no mask has a doubt: the signal is left out
    values, signal_ranks = label_issue_scores(signals, np.array([False, False, True]), weights)
    assert set(signal_ranks) == {"conflict", "edge"}
    assert values[0] == pytest.approx((2 * 1 / 3 + 2.5 / 3) / 3)
    assert values[1] == pytest.approx((2 * 2.5 / 3 + 0.5 / 3) / 3)
    assert values[2] == 1
    assert rank_order(values, ["a", "b", "c"]) == [2, 1, 0]
    assert label_issue_scores({}, np.array([False]))[0].tolist() == [0.5]
    assert rank_order(np.array([0.5, 0.5]), ["b", "a"]) == [1, 0]


def test_explanations_start_with_the_most_important():
    conflict = ConfidentDisagreement(0.3, 0.5, 0.4, 0.6)
    signals = dict.fromkeys(WEIGHTS, 2.0) | {"conflict": 0.4, "unlike": 0.6, "doubt": math.nan}
    texts = explanations(signals, {"conflict": 0.99, "position": 0.95, "doubt": 0.99, "area": 0.3}, True, conflict)
    assert texts[0] == "image label: the mask contradicts it"
    assert texts[1].startswith("models: those not trained on it disagree, 30% of the mask")
    assert texts[2] == "position: 2.0 deviations from the usual" and len(texts) == 3
    assert explanations(signals, {"conflict": 0.5}, False, conflict) == ()
