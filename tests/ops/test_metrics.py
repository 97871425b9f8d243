"""Metrics by hand: four pixels, misses, empties, millimetres; and against scikit-learn and plain definitions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score, jaccard_score

from kmine.io.files import nan_to_none
from kmine.ops import metrics
from kmine.ops.metrics import (
    Correction,
    case_metrics,
    correction,
    correction_text,
    diagonal,
    hd95,
    lesion_metrics,
    metrics_from_json,
    nanmean,
    of_one_kind,
    pool_cases,
    summarise,
)
from kmine.types import CaseMetrics

NAN = float("nan")


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


def brute_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    """By definition: pixels with a neighbour outside the mask (or the image), all distances, 95th percentiles."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return np.argwhere(mask & ~inside) * np.array(spacing)

    apart = cdist(surface(a), surface(b))
    return max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))


SPACINGS = st.sampled_from([(1.0, 1.0), (0.7, 0.7), (2.5, 0.31), (0.001, 40.0)])


@given(hnp.arrays(bool, (9, 11)), hnp.arrays(bool, (9, 11)), SPACINGS)
@settings(max_examples=60, deadline=None)
def test_hd95_agrees_with_its_definition(a, b, spacing):
    if a.any() and b.any():
        assert hd95(a, b, spacing) == pytest.approx(brute_hd95(a, b, spacing), rel=1e-6, abs=1e-6)


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    rows, cols = np.indices(shape)
    return np.hypot(rows - centre[0], cols - centre[1]) <= radius


LARGE = {
    "apart": (disc((90, 120), (30, 30), 17), disc((90, 120), (55, 84), 23)),
    "inside": (disc((90, 120), (45, 60), 8), disc((90, 120), (40, 60), 39)),
    "at the border": (disc((90, 120), (0, 0), 20), disc((90, 120), (89, 119), 11)),
    "all of it": (np.ones((90, 120), bool), disc((90, 120), (45, 119), 30)),
    "one pixel": (disc((90, 120), (0, 119), 0), disc((90, 120), (60, 20), 25)),
    "two single pixels": (disc((90, 120), (0, 0), 0), disc((90, 120), (89, 119), 0)),
    "in pieces": (disc((90, 120), (20, 20), 9) | disc((90, 120), (70, 100), 3), disc((90, 120), (22, 20), 9)),
}


@pytest.mark.parametrize("spacing", [None, (2.5, 0.31)])
@pytest.mark.parametrize("name", LARGE)
def test_hd95_agrees_with_its_definition_on_lesions_of_real_size(name, spacing):
    a, b = LARGE[name]
    expected = brute_hd95(a, b, spacing or (1.0, 1.0))
    assert hd95(a, b, spacing) == pytest.approx(expected, rel=1e-6) == hd95(b, a, spacing)


@pytest.mark.parametrize("spacing", [None, (2.5, 0.31)])
def test_hd95_of_nothing(spacing):
    nothing, something = np.zeros((30, 40), bool), disc((30, 40), (0, 0), 3)
    assert math.isnan(hd95(nothing, nothing, spacing))
    row, col = spacing or (1, 1)
    far = pytest.approx(math.hypot(30 * row, 40 * col))
    assert hd95(nothing, something, spacing) == far == hd95(something, nothing, spacing)


@given(hnp.arrays(np.uint8, (7, 8), elements=st.sampled_from([0, 1, 2, 255])), hnp.arrays(bool, (7, 8)), st.data())
@settings(max_examples=60, deadline=None)
def test_dice_and_iou_agree_with_scikit_learn(truth, wrong, data):
    pred = np.where(wrong, data.draw(st.integers(0, 2)), np.where(truth == 255, 1, truth)).astype(np.uint8)
    case, seen = case_metrics("a", pred, truth, 3, with_hd95=False), truth != 255
    present = [c for c in (1, 2) if ((pred == c) & seen).any() or (truth == c).any()]
    if not present:
        assert math.isnan(case.dice) and math.isnan(case.iou)
        return
    how = {"labels": present, "average": "macro", "zero_division": 0.0}
    assert case.dice == pytest.approx(f1_score(truth[seen], pred[seen], **how))
    assert case.iou == pytest.approx(jaccard_score(truth[seen], pred[seen], **how))


def test_a_volume_is_counted_as_one_case():
    truth, pred = np.zeros((2, 3, 4, 4), np.uint8)
    truth[0], pred[0] = 1, 1  # 16 of 16
    truth[1, 0] = 1  # 4 missed in this slice
    pred[2, 0, :2] = 1  # 2 false alarms
    slices = [case_metrics(str(n), pred[n], truth[n], 2) for n in range(3)]
    assert [case.counts for case in slices] == [((16, 16, 16),), ((0, 0, 4),), ((0, 2, 0),)]
    volume = pool_cases("v", slices)
    assert volume.dice == pytest.approx(2 * 16 / (18 + 20)) and volume.iou == pytest.approx(16 / 22)
    assert (volume.num_missed, volume.counts) == (0, ((16, 18, 20),)), "the lesion was found, if not in every slice"
    assert volume.hd95 == pytest.approx(np.mean([0, math.hypot(4, 4), math.hypot(4, 4)]))
    assert volume.dice == case_metrics("v", pred.reshape(12, 4), truth.reshape(12, 4), 2).dice
    assert pool_cases("w", slices[1:2]).num_missed == 1


def test_a_volume_needs_the_counts_of_all_its_slices():
    case = case_metrics("a", ids([1, 1]), ids([1, 0]), 2)
    old = CaseMetrics("b", 1.0, 1.0, 0.0, 0)
    for parts in ([case, old], [], [case, case_metrics("c", ids([1]), ids([1]), 3)]):
        with pytest.raises(ValueError, match="counts"):
            pool_cases("v", parts)


def test_a_case_read_back_from_json_equals_itself():
    case = case_metrics("a", ids([1, 2]), ids([1, 0]), 3)
    assert CaseMetrics(**json.loads(json.dumps(asdict(case)))) == case


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        case_metrics("a", ids([1, 1]), ids([1]), 2)


def test_nanmean_skips_missing_values():
    assert nanmean([1.0, None, float("nan"), 2.0]) == 1.5
    assert np.isnan(nanmean([None, float("nan")]))


def test_metrics_survive_json():
    truth, empty = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    summary = summarise([case_metrics("a", truth, truth, 2), case_metrics("b", empty, empty, 2)])
    saved = json.loads(json.dumps(nan_to_none(asdict(summary))))
    assert repr(metrics_from_json(saved)) == repr(summary)


def of_counts(sample_id: str, *counts: tuple[int, int, int]) -> CaseMetrics:
    """A case of (pixels in both, predicted, true), a triple a class, as pooling makes it."""
    return pool_cases(sample_id, [CaseMetrics("slice", NAN, NAN, NAN, 0, counts)])


def test_the_score_counts_silence_one_and_a_false_alarm_zero():
    found, silent, alarm, missed = (of_counts("a", row) for row in ((2, 4, 4), (0, 0, 0), (0, 3, 0), (0, 0, 3)))
    assert [case.score for case in (found, silent, alarm, missed)] == [0.5, 1.0, 0.0, 0.0]
    metrics = summarise([found, silent, alarm, missed])
    assert metrics.score == 1.5 / 4 and metrics.dice == pytest.approx(0.5 / 3) and metrics.num_empty == 1
    assert np.isnan(summarise([]).score)


def test_the_score_of_several_classes_counts_each_of_them():
    """An organ with Dice .5; the lesion, which is not there, is left alone or seen."""
    silent, alarm = of_counts("a", (2, 4, 4), (0, 0, 0)), of_counts("a", (2, 4, 4), (0, 5, 0))
    assert (silent.dice, silent.score) == (0.5, 0.75) and (alarm.dice, alarm.score) == (0.25, 0.25)


def test_lesion_metrics_of_two_methods_have_the_same_denominators():
    """Two lesions and three clean images: one method is silent on all three, the other on one."""
    lesions = [of_counts("a", (2, 4, 4)), of_counts("b", (0, 0, 3))]
    silent, alarm = of_counts("c", (0, 0, 0)), of_counts("c", (0, 7, 0))
    one, other = summarise([*lesions, silent, silent, silent]), summarise([*lesions, silent, alarm, alarm])
    assert (one.dice, other.dice) == (0.25, 0.125), "the mean of Dice falls although no lesion is seen worse"
    assert asdict(lesion_metrics(one)) == {"dice_lesion": 0.25, "num_clean": 3, "false_alarm_rate": 0.0}
    assert asdict(lesion_metrics(other)) == {
        "dice_lesion": 0.25,
        "num_clean": 3,
        "false_alarm_rate": pytest.approx(2 / 3),
    }


def test_lesion_metrics_count_the_classes_that_the_truth_lacks():
    cases = [
        of_counts("a", (2, 4, 4), (0, 5, 0)),
        of_counts("b", (0, 0, 0), (4, 4, 4)),
        of_counts("c", (3, 3, 3), (2, 4, 4)),
    ]
    found = lesion_metrics(summarise(cases))
    assert (found.dice_lesion, found.num_clean, found.false_alarm_rate) == (pytest.approx((0.5 + 1 + 0.75) / 3), 2, 0.5)


def test_without_counts_there_are_no_lesion_metrics_and_scores_stay_of_one_kind():
    new, old = summarise([of_counts("a", (2, 4, 4), (0, 0, 0))]), summarise([CaseMetrics("a", 0.5, 0.5, 1.0, 0)])
    assert np.isnan([lesion_metrics(old).dice_lesion, lesion_metrics(old).false_alarm_rate]).all()
    assert [m.score for m in of_one_kind(new, new)] == [0.75, 0.75]
    assert [m.score for m in of_one_kind(new, old)] == [0.5, 0.5]


def test_correction_by_hand():
    truth = np.array([[1, 1, 1, 0, 0, 0, 255, 2]], np.uint8)
    local = np.array([[1, 0, 0, 1, 0, 0, 1, 1]], np.uint8)
    # Right, corrected, still wrong, ignored, broken, ignored; then a pixel that does not count, and another class.
    pseudo = np.array([[1, 1, 0, 255, 1, 255, 1, 2]], np.uint8)
    found = correction(local, pseudo, truth)
    assert found == Correction(wrong=4, corrected=2, broken=1) and found.shares == (0.5, 0.25)
    assert correction(local, local, truth) == Correction(4, 0, 0)
    assert Correction.total([found, Correction(6, 1, 4)]).shares == (0.3, 0.5)
    assert np.isnan(Correction.total([]).shares).all()


def test_unknown_corrections_are_a_dash():
    assert correction_text((0.46, 0.081)) == "46 % / 8 %"
    assert correction_text(None) == correction_text([None, None]) == correction_text((math.nan, math.nan)) == "–"
