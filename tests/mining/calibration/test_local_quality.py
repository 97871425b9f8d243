"""Quality estimates without a segmenter, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.made_up_run import ALONE

from kmine.config import PromptsConfig
from kmine.mining.calibration.local_quality import (
    LocalQualityEstimator,
    local_only,
    local_quality_summary,
    score_local_objects,
)
from kmine.types import Probs


def probs_of(*blobs: tuple[slice, slice, float]) -> Probs:
    """(10, 20): foreground .1, but in the blobs."""
    prob = np.full((10, 20), 0.1, np.float32)
    for rows, columns, value in blobs:
        prob[rows, columns] = value
    return Probs("x", np.stack([1 - prob, prob]))


OBJECT = (slice(2, 6), slice(3, 8), 0.8)


def test_the_evidence_of_an_object_is_that_of_its_own_pixels():
    cfg = local_only(PromptsConfig(min_area_px=2, min_area_fraction=0, box_margin=0))
    too_small = (slice(8, 9), slice(15, 16), 0.9)
    ((prompts, evidence),) = score_local_objects(probs_of(OBJECT, too_small), cfg, {1: 0.05})
    assert prompts.component.sum() == 20
    assert evidence.area_ratio == pytest.approx(20 / 200 / 0.05)
    assert evidence.confidence_inside == pytest.approx(0.8)
    # Even without a margin the box reaches 2 px beyond the object.
    assert evidence.confidence_outside == pytest.approx(0.1)
    assert np.isnan([evidence.tta_std, evidence.predicted_iou]).all()
    assert score_local_objects(probs_of(), cfg, {1: 0.05}) == []


def test_settings_that_only_a_segmenter_uses_are_off():
    cfg = local_only(PromptsConfig(source="cascade", passes=2, mask_hint=True, num_jitters=3))
    assert (cfg.source, cfg.passes, cfg.mask_hint, cfg.num_jitters) == ("local", 1, False, 0)
    assert local_only(cfg) == cfg


def test_each_augmentation_has_a_calibrator_of_its_own():
    estimator = LocalQualityEstimator.from_json(ALONE)
    for tta, expected in (("none", 0.8), ("hflip", 0.4)):
        ((prompts, estimate),) = estimator.estimates(probs_of(OBJECT), tta)
        assert estimate == pytest.approx(expected) and prompts.class_id == 1
    assert estimator.estimates(probs_of(), "none") == []


def test_an_estimator_survives_json():
    estimator = LocalQualityEstimator.from_json(ALONE)
    assert LocalQualityEstimator.from_json(estimator.to_json()) == estimator


def test_the_summary_names_the_basis_of_the_estimates():
    text = local_quality_summary(ALONE)
    assert "41 objects" in text and "3 models" in text and "mean estimate 0.70, mean Dice 0.75" in text
    unknown = ALONE | {"by_tta": {"none": ALONE["by_tta"]["none"] | {"rank_correlation": None}}}
    assert "rank correlation with true Dice unknown" in local_quality_summary(unknown)
