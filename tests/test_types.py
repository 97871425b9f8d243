"""Types that refuse contradictions, and results that round-trip."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from kmine.io.files import nan_to_none
from kmine.types import (
    EVIDENCE_COLUMNS,
    Candidate,
    CaseMetrics,
    Decision,
    Evidence,
    Metrics,
    Probs,
    RoundResult,
    most_probable,
    stopped_by,
)

NAN = math.nan
CASES = (CaseMetrics("a", 0.5, 1 / 3, 2.0, 0, ((1, 2, 3),)), CaseMetrics("b", NAN, NAN, NAN, 0))
METRICS = Metrics(CASES, 0.5, 1 / 3, 2.0, 0, 1)
RESULT = RoundResult(1, 4, 7, METRICS, METRICS, True, {"fit": 1.5}, "adopted", 0.1, -0.1, 0.3)


def test_a_decision_has_a_known_reason_that_agrees_with_kept():
    with pytest.raises(ValueError, match="reason must be one of"):
        Decision(True, "liked", Evidence())
    for kept, reason in ((True, "low_agreement"), (False, "kept"), (False, "kept_local")):
        with pytest.raises(ValueError, match="contradicts"):
            Decision(kept, reason, Evidence())


def test_columns_of_evidence_are_its_fields_but_for_one_frozen_name():
    names = [f.name for f in fields(Evidence)]
    assert [(n, c) for n, c in zip(names, EVIDENCE_COLUMNS, strict=True) if n != c] == [
        ("auxiliary_dice", "witness_dice")
    ]


@pytest.mark.parametrize(("predicted_iou", "best"), [([0.2, 0.9, 0.9], 1), ([NAN, 0.1, NAN], 1), ([NAN, NAN, NAN], 0)])
def test_the_best_mask_has_the_highest_known_predicted_iou(predicted_iou, best):
    masks = np.zeros((3, 1, 1), bool)
    assert Candidate(masks, np.array(predicted_iou), np.ones(3), None, masks[:0]).best == best


def test_the_mask_of_probabilities_is_the_most_probable_class():
    probs = np.array([[[0.5, 0.2, 0.1]], [[0.3, 0.5, 0.3]], [[0.2, 0.3, 0.6]]], np.float32)
    assert Probs("a", probs).mask.tolist() == [[0, 1, 2]]


def test_the_most_probable_class_is_that_of_argmax_and_of_equals_the_lowest():
    rng = np.random.default_rng(0)
    for classes in (1, 2, 4):
        probs = rng.integers(0, 3, (2, classes, 5, 7)).astype(np.float32)  # with many ties
        ids = most_probable(probs)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, probs.argmax(axis=1))
        np.testing.assert_array_equal(most_probable(probs[0]), probs[0].argmax(axis=0))


def test_a_result_round_trips_through_json_with_null_for_nan():
    saved = json.loads(json.dumps(nan_to_none({"signature": "s", **asdict(RESULT)}), allow_nan=False))
    assert repr(RoundResult.from_json(saved)) == repr(RESULT)


def test_a_round_without_pseudo_masks_repeats_the_metrics_and_is_not_adopted():
    result = RESULT.without_training(2, {"changes": 0.1})
    assert (result.round_idx, result.num_labeled, result.num_pseudo) == (2, 4, 0)
    assert result.metrics is RESULT.metrics and not result.adopted and result.reason == "refused: no pseudo mask"
    assert result.has_no_pseudo_masks and not RESULT.has_no_pseudo_masks and math.isnan(result.difference)


@pytest.mark.parametrize(
    ("last", "rounds", "reason"),
    [
        (RESULT, 1, "rounds"),
        (RESULT, 3, "refused_twice"),
        (RESULT.without_training(2, {}), 3, "no_pseudo_masks"),
        (RESULT.without_training(3, {}), 3, "no_pseudo_masks"),
        (replace(RESULT, round_idx=0, num_pseudo=0), 0, "rounds"),
    ],
)
def test_the_reason_to_stop_follows_from_the_last_round(last, rounds, reason):
    assert stopped_by([RESULT, last], rounds) == reason
