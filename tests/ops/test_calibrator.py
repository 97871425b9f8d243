"""The applied calibrator, by hand, and its form on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kmine.ops.calibrator import (
    FEATURES,
    Calibration,
    Calibrator,
    RiskGuarantee,
    describe_threshold,
    evidence_from_row,
    evidence_row,
    feature_rows,
)
from kmine.types import Evidence

NUM = len(FEATURES)
GUARANTEE = RiskGuarantee(0.5, True, 0.8, 0.9, 1.0, 40)


def calibrator(**weights: float) -> Calibrator:
    """Median .5 and standard deviation .1 of every feature; the identity after the regression, within [.2, .9]."""
    values = tuple(weights.get(name, 0.0) for name in FEATURES)
    return Calibrator((0.5,) * NUM, (0.1,) * NUM, values, 0.6, ((0.2, 0.2), (0.9, 0.9)))


def test_estimate_by_hand():
    # .6 + .1 * (.7 - .5) / .1 - .05 * (.4 - .5) / .1
    made = calibrator(predicted_iou=0.1, agreement_iou=-0.05)
    assert made.estimate(Evidence(predicted_iou=0.7, agreement_iou=0.4)) == pytest.approx(0.85)


def test_a_missing_score_counts_as_the_median():
    made = calibrator(predicted_iou=0.1)
    assert made.estimate(Evidence()) == made.estimate(Evidence(predicted_iou=0.5)) == pytest.approx(0.6)


def test_a_feature_without_variance_is_ignored():
    made = Calibrator((0.5,) * NUM, (0.0,) * NUM, (1.0,) * NUM, 0.6, ((0.0, 0.0), (1.0, 1.0)))
    assert made.estimate(Evidence(predicted_iou=9.0)) == pytest.approx(0.6)


def test_estimates_stay_between_the_outer_knots():
    made = calibrator(predicted_iou=0.1)
    wild = [Evidence(predicted_iou=value, area_ratio=area) for value in (-50, 50) for area in (0, 1e9)]
    assert made.estimates(feature_rows(wild)).tolist() == [0.2, 0.2, 0.9, 0.9]
    assert made.estimates(feature_rows([])).shape == (0,)


def test_areas_count_by_their_ratio_in_either_direction():
    area = FEATURES.index("area_ratio")
    rows = feature_rows([Evidence(area_ratio=ratio) for ratio in (1, 4, 0.25, 0)])
    assert rows[:, area] == pytest.approx([0, math.log(4), math.log(4), math.log(1000)])


def test_evidence_survives_a_row():
    evidence = Evidence(predicted_iou=0.7, area_ratio=2.0)
    row = json.loads(json.dumps({k: None if math.isnan(v) else v for k, v in evidence_row(evidence).items()}))
    assert np.array_equal(feature_rows([evidence_from_row({"other": 1, **row})]), feature_rows([evidence]), True)


def test_a_calibration_survives_json_under_its_names_on_disk():
    made = Calibration(calibrator(predicted_iou=0.1), calibrator(), GUARANTEE)
    saved = json.loads(json.dumps(made.to_json()))
    assert Calibration.from_json(saved) == made
    assert list(saved) == ["quality", "difference", "promise"]
    assert list(saved["promise"]) == ["threshold", "kept", "lower_bound", "mean", "coverage", "num_objects"]
    assert saved["difference"]["features"] == list(FEATURES)
    assert math.isnan(RiskGuarantee.from_json(saved["promise"] | {"mean": None}).mean)


@pytest.mark.parametrize(
    ("iou", "agreement", "expected"),
    [
        (0.9, 0.5, ("segmenter", 0.8, 0.4)),  # difference .4, mean .6: estimates .8 and .4
        (0.1, 0.5, ("local", 0.8, 0.4)),
        (0.52, 0.5, ("both", 0.61, 0.59)),
        (0.9, math.nan, ("segmenter", 0.6, math.nan)),  # no local mask: the mean is the segmenter's own
        (3.0, 0.5, ("segmenter", 0.9, 0.0)),  # within the knots, and within 0 and 1
    ],
)
def test_the_mask_that_is_used_by_hand(iou, agreement, expected):
    made = Calibration(calibrator(), replace(calibrator(predicted_iou=0.1), intercept=0.0), GUARANTEE)
    found = made.estimate(Evidence(predicted_iou=iou, agreement_iou=agreement), 0.03)
    assert found.source == expected[0]
    assert found[1:] == (pytest.approx(expected[1]), pytest.approx(expected[2], nan_ok=True))


def test_a_ranking_is_described():
    record = {"keep": 0.5, "threshold": 0.1, "num_objects": 5, "num_images": 3}
    text = "the best 50% by their evidence are kept, measured on 5 objects in 3 unlabeled images"
    assert describe_threshold(record) == text


@pytest.mark.parametrize(
    ("mean", "text"),
    [
        (0.8, "masks from estimated Dice 0.70 on are kept: 60% of 5 objects in 3 unlabeled images, mean estimate 0.80"),
        (None, "masks from estimated Dice 0.70 on are kept, none of 5 objects in 3 unlabeled images"),
    ],
)
def test_a_threshold_is_described(mean, text):
    record = {"threshold": 0.7, "mean_estimate": mean, "coverage": 0.6, "num_objects": 5, "num_images": 3}
    assert describe_threshold(record) == text
