"""The gate: each score by hand, each reason, which mask is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import ANYTHING_GOES

from kmine.config import GateConfig
from kmine.mining.gate import Beside, collect_evidence, gate, why_none_is_kept
from kmine.mining.rank import Ranking
from kmine.ops.calibrator import FEATURES, Calibration, Calibrator, RiskGuarantee, feature_rows
from kmine.types import Candidate, Evidence, Probs, Prompts


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
        return Beside(Probs("a", np.stack([1 - p, p])))

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


def test_slice_dice_is_the_better_one_of_two_neighbouring_slices(case):
    def score(*masks):
        return collect_evidence(*case, {}, Beside(slices=[mask.astype(np.uint8) for mask in masks])).slice_dice

    # The candidate is the square at (10, 12).
    assert score(square(15, 12)) == pytest.approx(2 * 50 / 200)
    assert score(square(28, 28)) == 0 and score(2 * square(10, 12)) == 0  # far away, of another class
    assert score(square(28, 28), square(11, 12)) == pytest.approx(2 * 90 / 200)
    assert np.isnan(score()) and np.isnan(score(square(10, 12, size=44)))


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


def test_a_lesion_free_image_keeps_nothing(case):
    assert decide(case, image_label=0).reason == "contradicts_image_label"
    assert decide(case, image_label=1).kept


def test_an_empty_candidate_is_dropped(case):
    empty = replace(case[2], masks=np.zeros((1, 40, 40), bool), predicted_iou=np.ones(1, np.float32))
    decision = decide(case, candidate=replace(empty, stability_score=np.full(1, np.nan, np.float32)))
    assert (decision.kept, decision.reason) == (False, "empty_candidate")


# -- ranked


def ranked(case, centre: Evidence, threshold: float, image_label=None):
    """The decision by distances from `centre`, of scores that all spread by .1."""
    ranking = Ranking(tuple(np.nan_to_num(feature_rows([centre])[0])), (0.1,) * len(FEATURES), threshold)
    settings = {"area_prior": {1: 0.125}, "image_label": image_label, "cfg": GateConfig()}
    return gate(*case, calibration=ranking, **settings)


def test_an_object_at_the_threshold_is_kept_with_the_mask_of_the_segmenter(case):
    own = collect_evidence(*case, {1: 0.125})
    decision = ranked(case, own, 0.0)
    assert (decision.kept, decision.reason, decision.source) == (True, "kept", "segmenter")
    assert np.isnan(decision.estimated_dice) and decision.evidence.agreement_iou == pytest.approx(80 / 120)
    assert ranked(case, own, 1e-5).reason == "low_rank"
    assert ranked(case, own, -1.0, image_label=0).reason == "contradicts_image_label"


@pytest.mark.parametrize(("name", "sign"), [("predicted_iou", 1), ("confidence_outside", -1), ("tta_std", -1)])
def test_the_rank_rises_with_evidence_for_the_mask(case, name, sign):
    own = collect_evidence(*case, {1: 0.125})
    lower, higher = (replace(own, **{name: getattr(own, name) + shift}) for shift in (-0.1, 0.1))
    assert ranked(case, lower, 0.05).kept == (sign == 1) and ranked(case, higher, 0.05).kept == (sign == -1)


# -- calibrated


def always(dice: float) -> Calibrator:
    nothing = (0.0,) * len(FEATURES)
    return Calibrator(nothing, nothing, nothing, 0.0, ((0.0, dice), (1.0, dice)))


def calibrated(case, segmenter: float, local: float, threshold: float = 0.6, image_label=None, candidate=None):
    """The decision where the estimates are `segmenter` and `local`, by their mean and difference."""
    probs, prompts, own = case
    quality, difference = (replace(always(0), intercept=i) for i in ((segmenter + local) / 2, segmenter - local))
    quality = replace(quality, knots=((0.0, 0.0), (1.0, 1.0)))
    calibration = Calibration(quality, difference, RiskGuarantee(threshold, True, 0.7, 0.8, 1.0, 30))
    settings = {"area_prior": {1: 0.125}, "image_label": image_label, "cfg": GateConfig(margin=0.05)}
    return gate(probs, prompts, candidate or own, calibration=calibration, **settings)


@pytest.mark.parametrize(
    ("segmenter", "local", "reason", "source", "estimated"),
    [
        (0.9, 0.7, "kept", "segmenter", 0.9),
        (0.7, 0.9, "kept_local", "local", 0.9),
        (0.80, 0.78, "kept", "both", 0.80),
        (0.78, 0.80, "kept", "both", 0.78),
        (0.58, 0.62, "low_estimated_dice", "both", 0.58),
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
    decision = calibrated(case, 0.9, 0.8, candidate=empty)
    assert (decision.reason, decision.source, decision.estimated_segmenter) == ("kept_local", "local", 0.0)
    assert decision.estimated_dice == decision.estimated_local == pytest.approx(0.8)
    assert calibrated(case, 0.9, 0.5, candidate=empty).reason == "low_estimated_dice"
    without_component = (case[0], replace(case[1], component=None), empty)
    decision = calibrated(without_component, 0.9, 0.9)
    assert decision.reason == "empty_candidate" and np.isnan(decision.estimated_local)
    assert calibrated(without_component, 0.9, 0.9, candidate=case[2]).source == "segmenter"


def test_an_image_level_label_outweighs_every_estimate(case):
    assert calibrated(case, 1.0, 1.0, image_label=0).reason == "contradicts_image_label"


def test_a_round_that_kept_nothing_names_the_limit_that_dropped_most():
    said = why_none_is_kept(["low_rank", "low_estimated_dice", "low_estimated_dice"])
    assert said.startswith("most often low_estimated_dice (2 of 3); lower gate.target_dice, label more images")
    assert "low_stability (1 of 1); label more images" in why_none_is_kept(["low_stability"]), "of an older run"
    assert why_none_is_kept(["no_component"]).startswith("most often no_component (1 of 1); label more images")
