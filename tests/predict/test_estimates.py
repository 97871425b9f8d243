"""Estimated Dice: reasons for its absence, objects with boxes and areas, rows of objects.csv."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.made_up_run import ABOUT, ALONE

from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.predict.estimates import (
    OBJECT_COLUMNS,
    ObjectEstimate,
    estimate_objects,
    load_estimator,
    local_quality_of_run,
    object_rows,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no calibrated gate"),
        ("{", "calibration.json is damaged"),
        ("[1]", "calibration.json is damaged"),
        ("{}", "older than estimates"),
        ('{"alone": null}', "too few labeled objects"),
    ],
)
def test_a_run_without_an_estimator_has_a_reason(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "calibration").mkdir()
        (tmp_path / "calibration" / "calibration.json").write_text(text)
    found, why = local_quality_of_run(tmp_path)
    assert found is None and reason in why


def test_a_calibrated_run_has_an_estimator_and_no_reason(tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "calibration.json").write_text(json.dumps({"alone": ALONE}))
    assert local_quality_of_run(tmp_path) == (ALONE, "")


@pytest.mark.parametrize(
    ("changes", "tta", "reason"),
    [
        ({"local_quality": ALONE}, "hflip", ""),
        ({"local_quality": ALONE}, "flips", "with --tta none or hflip, not with flips"),
        ({"no_estimate": "why not"}, "none", "why not"),
        ({}, "none", "exported without an estimator"),
    ],
)
def test_an_estimator_is_used_with_the_flips_it_was_fitted_with(changes, tta, reason):
    estimator, why = load_estimator(replace(ABOUT, **changes), tta)
    assert (estimator is None) == bool(reason) and reason in why and bool(why) == bool(reason)


def test_objects_have_their_area_inclusive_box_and_estimate():
    probs = np.full((2, 20, 30), 0.1, np.float32)
    probs[1, 2:6, 3:10] = 0.8
    probs[0] = 1 - probs[1]
    estimator = LocalQualityEstimator.from_json(ALONE)
    mask = (probs[1] > 0.5).astype(np.uint8)
    (found,) = estimate_objects(estimator, "none", probs, None, mask)
    assert found[:3] == (1, 28, (3, 2, 9, 5)) and found.estimate == pytest.approx(0.8)
    assert estimate_objects(estimator, "none", probs, None, np.zeros_like(mask)) == []
    assert estimate_objects(None, "none", probs, None, mask) is None


def test_rows_of_objects_have_the_columns_of_the_table():
    (row,) = object_rows([(7, ObjectEstimate(1, 28, (3, 2, 9, 5), 0.81234))], ("background", "polyp"))
    assert {*row, "file"} == set(OBJECT_COLUMNS)
    assert (row["slice"], row["class"], row["px"], row["x1"], row["estimated_dice"]) == (7, "polyp", 28, 9, 0.8123)
