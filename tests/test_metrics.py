"""Metrics by hand: four pixels, misses, empties, millimetres; HD95 against a second implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_erosion, distance_transform_edt

from kmine import metrics
from kmine.metrics import case_metrics, diagonal, hd95, summarise


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def test_dice_and_iou_from_counts():
    case = case_metrics("a", ids([1, 1], [0, 0]), ids([1, 0], [1, 0]), 2)
    assert case.dice == 0.5
    assert case.iou == pytest.approx(1 / 3)
    assert case.num_missed == 0


def test_overlap_of_four_pixels():
    a = np.array([[1, 1], [0, 0]], bool)
    b = np.array([[1, 0], [1, 0]], bool)
    empty = np.zeros((2, 2), bool)
    assert metrics.dice(a, b) == 0.5
    assert metrics.iou(a, b) == pytest.approx(1 / 3)
    assert metrics.dice(a, empty) == 0.0
    assert np.isnan(metrics.dice(empty, empty)) and np.isnan(metrics.iou(empty, empty))


def test_mean_pairwise_dice_over_three_masks():
    a, b, c = np.zeros((3, 1, 4), bool)
    a[0, :2], b[0, :2], c[0, 1:3] = True, True, True
    assert metrics.mean_pairwise_dice(np.stack([a, b, c])) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert np.isnan(metrics.mean_pairwise_dice(a[None]))


def test_ignored_pixels_count_nowhere():
    case = case_metrics("a", ids([1, 1], [0, 0]), ids([1, 255], [255, 0]), 2)
    assert case.dice == 1.0


def test_a_miss_costs_and_is_counted():
    truth = np.zeros((30, 40), np.uint8)
    truth[5:9, 5:9] = 1
    case = case_metrics("a", np.zeros_like(truth), truth, 2)
    assert (case.dice, case.iou, case.hd95, case.num_missed) == (0, 0, 50.0, 1)


def test_a_false_alarm_costs_but_is_no_miss():
    pred = np.zeros((30, 40), np.uint8)
    pred[5:9, 5:9] = 1
    case = case_metrics("a", pred, np.zeros_like(pred), 2)
    assert (case.dice, case.hd95, case.num_missed) == (0, 50.0, 0)


def test_both_empty_is_left_out_and_counted():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    nothing = case_metrics("a", empty, empty, 2)
    assert math.isnan(nothing.dice) and math.isnan(nothing.hd95)
    found = summarise([nothing, case_metrics("b", full, full, 2)])
    assert (found.dice, found.num_empty, found.num_missed) == (1.0, 1, 0)
    assert len(found.cases) == 2


def test_classes_are_averaged_within_a_case_where_they_occur():
    truth, pred = ids([1, 1, 0, 0]), ids([1, 0, 0, 0])
    assert case_metrics("a", pred, truth, 3).dice == pytest.approx(2 / 3)  # class 2 occurs nowhere
    pred2 = ids([1, 0, 2, 0])
    assert case_metrics("a", pred2, truth, 3).dice == pytest.approx((2 / 3 + 0) / 2)


def test_hd95_of_shifted_squares_is_the_shift_in_pixels_or_millimetres():
    truth = np.zeros((60, 60), bool)
    truth[20:30, 20:30] = True
    pred = np.roll(truth, 6, axis=1)
    assert hd95(pred, truth) == pytest.approx(6)
    assert hd95(pred, truth, (2.0, 0.5)) == pytest.approx(3)
    assert hd95(np.roll(truth, 6, axis=0), truth, (2.0, 0.5)) == pytest.approx(12)
    assert diagonal((30, 40), (2.0, 1.0)) == pytest.approx(math.hypot(60, 40))


def reference_hd95(a: np.ndarray, b: np.ndarray) -> float:
    def surface(mask):
        return mask & ~binary_erosion(np.pad(mask, 1))[1:-1, 1:-1]

    sa, sb = surface(a), surface(b)
    forth, back = distance_transform_edt(~sb)[sa], distance_transform_edt(~sa)[sb]
    return float(max(np.percentile(forth, 95), np.percentile(back, 95)))


@given(hnp.arrays(bool, (9, 11)), hnp.arrays(bool, (9, 11)))
@settings(max_examples=60, deadline=None)
def test_hd95_agrees_with_distance_transforms(a, b):
    if a.any() and b.any():
        assert hd95(a, b) == pytest.approx(reference_hd95(a, b), abs=1e-5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        case_metrics("a", ids([1, 1]), ids([1]), 2)
