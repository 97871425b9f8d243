"""Suspicion: who may bear witness, what counts as conflict, what is odd, and how it is put together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmine.audit.ranking import (
    WEIGHTS,
    ConfidentDisagreement,
    ConfidentThresholds,
    ReferenceModel,
    confident_disagreement,
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

NONE = frozenset()


def test_a_model_that_learned_a_mask_is_no_witness_and_one_that_asked_for_it_only_in_need():
    fold = ReferenceModel("fold_0", frozenset({"label a"}), NONE)
    first = ReferenceModel("round_00", frozenset({"label a", "label b"}), frozenset({1}))
    second = ReferenceModel("round_01", frozenset({"label a", "label b", "x"}), frozenset({2}))
    everybody = [fold, first, second]
    assert held_out_models(everybody, "x", 1) == [0]  # round 0 asked in round 1, round 1 learned x
    assert held_out_models(everybody, "x", 2) == [0, 1]
    assert held_out_models(everybody, "y", 2) == [0, 1]  # round 1 did not learn y, but asked in round 2
    assert held_out_models(everybody, "y", 3) == [0, 1, 2]
    assert held_out_models([first], "x", 1) == [0]  # nobody else is there
    assert held_out_models(everybody, "label b", 0) == [0]
    assert held_out_models(everybody, "label a", 0) == []


def probs(foreground: list[float]) -> np.ndarray:
    p = np.array([foreground], np.float32)
    return np.stack([1 - p, p])


def test_conflict_by_hand():
    # Four pixels; sure from .8 of either class on. The mask has the first two, the model the middle two.
    sure = np.array([0.8, 0.8])
    found = confident_disagreement(probs([0.1, 0.9, 0.9, 0.4]), np.array([[1, 1, 0, 0]], np.uint8), sure)
    assert found.mislabeled == pytest.approx(1 / 2)  # the first pixel, of two
    assert found.missed == pytest.approx(1 / 2)  # the third, of two that are surely foreground
    assert found.conflict == pytest.approx(2 / 3)  # of three that either has
    assert found.soft_dice_distance == pytest.approx(1 - 2 * 1.0 / (2.3 + 2))


def test_who_is_not_sure_says_nothing_and_ignored_pixels_are_not_asked():
    mask = np.array([[1, 0, 255, 255]], np.uint8)
    unsure = confident_disagreement(probs([0.3, 0.7, 0.9, 0.1]), mask, np.array([0.8, 0.8]))
    assert unsure.conflict == 0 and unsure.mislabeled == 0 and math.isnan(unsure.missed)


def test_an_empty_mask_is_contradicted_only_by_what_is_surely_there():
    empty, sure = np.zeros((1, 2), np.uint8), np.array([0.8, 0.8])
    assert confident_disagreement(probs([0.1, 0.2]), empty, sure)[2:] == (0.0, 0.0)
    assert confident_disagreement(probs([0.1, 0.9]), empty, sure)[2:] == (1.0, 1.0)


def test_another_class_is_a_conflict_too():
    three = np.array([[[0.0]], [[0.9]], [[0.1]]], np.float32)
    assert confident_disagreement(three, np.array([[2]], np.uint8), np.full(3, 0.5)).conflict == 1


def test_sure_is_what_a_class_usually_gets_where_it_is_right():
    known = ConfidentThresholds(3)
    known.add(np.array([[[0.9, 0.3]], [[0.1, 0.7]], [[0.0, 0.0]]], np.float32), np.array([[0, 1]], np.uint8))
    assert known.thresholds() == pytest.approx([0.9, 0.7, 0.5])


def test_the_worst_object_counts_and_what_is_not_known_does_not():
    good = {"estimated_dice": 0.9, "agreement_iou": 0.8, "jitter_dice": 1.0, "tta_std": None, "witness_dice": math.nan}
    bad = {"estimated_dice": 0.5, "agreement_iou": 0.2, "jitter_dice": 0.6, "tta_std": 0.3}
    found = uncertainty_of([good, bad])
    assert found["doubt"] == pytest.approx(0.5)
    assert found["disagreement"] == pytest.approx((0.8 + 0.4 + 0.3) / 3)
    assert all(math.isnan(value) for value in uncertainty_of([]).values())


def test_a_shape_by_hand():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:4, 5:15] = 1
    area, x, y, length, roughness, parts = shape_features(mask)
    assert area == pytest.approx(math.log(20 / 200))
    assert (x, y) == pytest.approx((9.5 / 20, 2.5 / 10))
    # Variance of n pixels in a row, with their own extent: n^2 / 12.
    assert length == pytest.approx(math.log(10 / 2))
    assert roughness > 0.2 and parts == 0
    assert all(math.isnan(value) for value in shape_features(np.full((4, 4), 255, np.uint8)))


def test_the_odd_one_out_is_found_and_references_count_by_the_one_that_says_most():
    rng = np.random.default_rng(0)
    usual = rng.normal(0, 1, (50, 6))
    shapes = np.vstack([usual[:10], np.array([[8, 0, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0], [np.nan] * 6])])
    found = outliers(shapes, shapes, usual)
    assert int(np.nanargmax(found["area"])) == 10 and int(np.nanargmax(found["position"])) == 11
    assert all(math.isnan(found[name][12]) for name in found)
    alone = outliers(shapes, shapes)
    assert (found["area"][:12] >= alone["area"][:12]).all()


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
def test_a_mask_against_the_image_level_label(mask, label, wrong):
    assert contradicts_image_label(np.array([mask], np.uint8), label, 2) is wrong


@given(st.lists(st.one_of(st.integers(0, 5).map(float), st.just(math.nan)), max_size=20))
def test_ranks_keep_the_order_and_leave_the_unknown_in_the_middle(values):
    found = ranks(values)
    for a, b in zip(values, found, strict=True):
        assert 0 < b < 1 and (not math.isnan(a) or b == 0.5)
    known = [(a, b) for a, b in zip(values, found, strict=True) if not math.isnan(a)]
    assert all((a < c) == (b < d) for a, b in known for c, d in known)


def test_suspicion_is_the_weighted_mean_of_ranks_and_a_contradiction_stands_above():
    signals = [{"conflict": 0.0, "edge": 1.0}, {"conflict": 1.0, "edge": 0.0}, {"conflict": 0.0, "edge": 0.5}]
    weights = {"conflict": 2.0, "edge": 1.0, "doubt": 5.0}  # nobody has a doubt: it does not take part
    values, placed = label_issue_scores(signals, [False, False, True], weights)
    assert set(placed) == {"conflict", "edge"}
    assert values[0] == pytest.approx((2 * 1 / 3 + 2.5 / 3) / 3)
    assert values[1] == pytest.approx((2 * 2.5 / 3 + 0.5 / 3) / 3)
    assert values[2] == 1
    assert rank_order(values, ["a", "b", "c"]) == [2, 1, 0]
    assert label_issue_scores([{}], [False])[0].tolist() == [0.5]
    assert rank_order(np.array([0.5, 0.5]), ["b", "a"]) == [1, 0]


def test_causes_are_words_the_weightiest_first():
    conflict = ConfidentDisagreement(0.3, 0.5, 0.4, 0.6)
    signals = dict.fromkeys(WEIGHTS, 2.0) | {"conflict": 0.4, "unlike": 0.6, "doubt": math.nan}
    said = explanations(signals, {"conflict": 0.99, "position": 0.95, "doubt": 0.99, "area": 0.3}, True, conflict)
    assert said[0] == "contradicts the image-level label"
    assert said[1].startswith("models that did not learn it object: 30% of the mask")
    assert said[2] == "unusual place (2.0 deviations)" and len(said) == 3
    assert explanations(signals, {"conflict": 0.5}, False, conflict) == ()
