"""The gate: each score by hand, each reason, and the law of stricter thresholds."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers.small import ANYTHING_GOES
from hypothesis import given, settings
from hypothesis import strategies as st

from kmine.config import GateConfig
from kmine.mining.gate import collect_evidence, gate, why_none_is_kept
from kmine.ops.calibrator import (
    FEATURES,
    Calibration,
    Calibrator,
    RiskGuarantee,
)
from kmine.types import Candidate, Probs, Prompts


def square(top: int, left: int, side: int = 10, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture
def case() -> tuple[Probs, Prompts, Candidate]:
    component = square(10, 10)
    p = np.where(component, 0.9, 0.1).astype(np.float32)
    probs = Probs("a", np.stack([1 - p, p]), np.full((40, 40), 0.05, np.float32))
    prompts = Prompts(1, np.array([8, 8, 21, 21], np.float32), component=component)
    candidate = Candidate(
        masks=np.stack([square(0, 0), square(10, 12)]),
        predicted_iou=np.array([0.2, 0.8], np.float32),
        stability_score=np.array([1.0, 0.95], np.float32),
        low_res_logits=None,
        jittered_masks=np.stack([square(10, 12), square(10, 14)]),
    )
    return probs, prompts, candidate


def decide(case, cfg=ANYTHING_GOES, image_label=None, candidate=None):
    probs, prompts, own = case
    return gate(probs, prompts, candidate or own, area_prior={1: 0.125}, image_label=image_label, cfg=cfg)


def test_auxiliary_dice_compares_the_components_that_touch_the_object(case):
    def auxiliary(*parts):
        p = np.where(np.any(parts, axis=0), 0.9, 0.1).astype(np.float32)
        return Probs("a", np.stack([1 - p, p]))

    far = square(28, 28)
    # The candidate is the square at (10, 12); the auxiliary model has it shifted by 5 rows, and an object far away.
    assert collect_evidence(*case, {}, auxiliary(square(15, 12), far)).auxiliary_dice == pytest.approx(2 * 50 / 200)
    # Components that touch the local one count as well: the candidate at columns 12-21, the auxiliary one at 4-10.
    assert collect_evidence(*case, {}, auxiliary(square(10, 4, 7))).auxiliary_dice == pytest.approx(0)
    assert collect_evidence(*case, {}, auxiliary(square(10, 12), square(10, 4, 7))).auxiliary_dice == pytest.approx(
        2 * 100 / (100 + 149)
    )
    assert collect_evidence(*case, {}, auxiliary(far)).auxiliary_dice == 0
    assert np.isnan(collect_evidence(*case, {}).auxiliary_dice)


def test_every_score_of_the_best_mask_by_hand(case):
    e = collect_evidence(*case, {1: 0.125})
    assert e.predicted_iou == pytest.approx(0.8)
    assert e.stability_score == pytest.approx(0.95)
    assert e.agreement_iou == pytest.approx(80 / 120)
    assert e.jitter_dice == pytest.approx((1.0 + 0.8 + 0.8) / 3)
    assert e.confidence_inside == pytest.approx((80 * 0.9 + 20 * 0.1) / 100)
    box = 14 * 14  # pixels 8..21 in both directions
    assert e.confidence_outside == pytest.approx((20 * 0.9 + (box - 100 - 20) * 0.1) / (box - 100))
    assert e.area_ratio == pytest.approx((100 / 1600) / 0.125)
    assert e.tta_std == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("min_predicted_iou", 0.81, "low_predicted_iou"),
        ("min_stability", 0.96, "low_stability"),
        ("min_agreement", 0.7, "low_agreement"),
        ("min_jitter_dice", 0.9, "low_jitter_dice"),
        ("min_confidence", 0.8, "low_confidence"),
        ("max_confidence_outside", 0.2, "high_confidence_outside"),
        ("max_tta_std", 0.04, "high_tta_std"),
        ("max_area_ratio", 1.2, "area_outlier"),
    ],
)
def test_each_threshold_has_its_own_reason(case, limit, value, reason):
    assert decide(case).reason == "kept"
    assert decide(case, replace(ANYTHING_GOES, **{limit: value})).reason == reason


def test_a_lesion_free_image_keeps_nothing(case):
    assert decide(case, image_label=0).reason == "contradicts_image_label"
    assert decide(case, image_label=1).kept


def test_an_empty_candidate_is_dropped_whatever_the_limits(case):
    empty = replace(case[2], masks=np.zeros((1, 40, 40), bool), predicted_iou=np.ones(1, np.float32))
    decision = decide(case, candidate=replace(empty, stability_score=np.full(1, np.nan, np.float32)))
    assert (decision.kept, decision.reason) == (False, "empty_candidate")


def test_unknown_scores_fail_no_threshold(case):
    without_scores = replace(case[2], predicted_iou=np.full(2, np.nan), stability_score=np.full(2, np.nan))
    strict = replace(ANYTHING_GOES, min_predicted_iou=1.0, min_stability=1.0)
    decision = decide(case, strict, candidate=without_scores)
    assert decision.kept
    assert np.isnan(decision.evidence.predicted_iou) and np.isnan(decision.estimated_dice)


LIMITS = sorted(name for name in asdict(ANYTHING_GOES) if name.startswith(("min_", "max_")))


@given(st.dictionaries(st.sampled_from(LIMITS), st.floats(0, 1), max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_stricter_gate_never_keeps_more(changes):
    component = square(10, 10)
    p = np.where(component, 0.9, 0.1).astype(np.float32)
    probs = Probs("a", np.stack([1 - p, p]), np.full((40, 40), 0.05, np.float32))
    prompts = Prompts(1, np.array([8, 8, 21, 21], np.float32), component=component)
    candidate = Candidate(square(10, 12)[None], np.array([0.8]), np.array([0.9]), None, square(10, 13)[None])
    loose = {k: (1 + 9 * v if k == "max_area_ratio" and v > 0 else v) for k, v in changes.items()}
    loose = {k: v for k, v in loose.items() if not (k == "max_area_ratio" and v <= 1)}
    a = GateConfig(**{**asdict(ANYTHING_GOES), **loose})
    tighter = {
        k: min(1.0, v + 0.1)
        if k.startswith("min_")
        else (1 + (v - 1) / 2 if k == "max_area_ratio" else max(0, v - 0.1))
        for k, v in asdict(a).items()
        if k in LIMITS
    }
    b = replace(a, **tighter)
    kept_a, kept_b = (
        gate(probs, prompts, candidate, area_prior={1: 0.1}, image_label=None, cfg=c).kept for c in (a, b)
    )
    assert kept_a or not kept_b


# -- calibrated


def always(dice: float) -> Calibrator:
    nothing = (0.0,) * len(FEATURES)
    return Calibrator(nothing, nothing, nothing, 0.0, ((0.0, dice), (1.0, dice)))


def calibrated(case, segmenter: float, local: float, threshold: float = 0.6, image_label=None, candidate=None):
    probs, prompts, own = case
    calibration = Calibration(always(segmenter), always(local), RiskGuarantee(threshold, True, 0.7, 0.8, 1.0, 30))
    settings = {"area_prior": {1: 0.125}, "image_label": image_label, "cfg": GateConfig(margin=0.05)}
    return gate(probs, prompts, candidate or own, calibration=calibration, **settings)


@pytest.mark.parametrize(
    ("segmenter", "local", "reason", "source", "estimated"),
    [
        (0.9, 0.7, "kept", "segmenter", 0.9),
        (0.7, 0.9, "kept_local", "local", 0.9),
        (0.80, 0.78, "kept", "both", 0.80),
        (0.78, 0.80, "kept", "both", 0.78),
        (0.5, 0.4, "low_estimated_dice", "segmenter", 0.5),
        (0.2, 0.5, "low_estimated_dice", "local", 0.5),
        (0.6, 0.1, "kept", "segmenter", 0.6),
    ],
)
def test_the_better_supported_mask_is_used(case, segmenter, local, reason, source, estimated):
    decision = calibrated(case, segmenter, local)
    assert (decision.reason, decision.source, decision.estimated_dice) == (reason, source, pytest.approx(estimated))
    assert (decision.estimated_segmenter, decision.estimated_local) == (pytest.approx(segmenter), pytest.approx(local))
    assert decision.evidence.agreement_iou == pytest.approx(80 / 120), "every score is recorded"


def test_an_empty_candidate_is_dropped_unless_the_local_mask_is_supported(case):
    empty = replace(case[2], masks=np.zeros((2, 40, 40), bool))
    assert calibrated(case, 0.9, 0.9, candidate=empty).reason == "kept_local"
    without_component = (case[0], replace(case[1], component=None), empty)
    decision = calibrated(without_component, 0.9, 0.9)
    assert decision.reason == "empty_candidate" and np.isnan(decision.estimated_local)
    assert calibrated(without_component, 0.9, 0.9, candidate=case[2]).source == "segmenter"


def test_an_image_level_label_outweighs_every_estimate(case):
    assert calibrated(case, 1.0, 1.0, image_label=0).reason == "contradicts_image_label"


def test_a_round_that_kept_nothing_names_the_limit_that_dropped_most():
    said = why_none_is_kept(["low_stability", "area_outlier", "area_outlier"])
    assert said.startswith("most often area_outlier (2 of 3); raise gate.max_area_ratio, label more images")
    assert why_none_is_kept(["no_component"]).startswith("most often no_component (1 of 1); label more images")
