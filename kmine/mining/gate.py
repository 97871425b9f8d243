"""Which candidates become pseudo-labels: the evidence, and thresholds on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.config import GateConfig
from kmine.ops import masks, metrics
from kmine.ops.calibrator import Calibration
from kmine.types import Bool, Candidate, Decision, Evidence, Probs, Prompts

LIMITS = {
    "low_predicted_iou": "lower gate.min_predicted_iou",
    "low_stability": "lower gate.min_stability",
    "low_agreement": "lower gate.min_agreement",
    "low_jitter_dice": "lower gate.min_jitter_dice",
    "low_confidence": "lower gate.min_confidence",
    "high_confidence_outside": "raise gate.max_confidence_outside",
    "high_tta_std": "raise gate.max_tta_std",
    "area_outlier": "raise gate.max_area_ratio",
    "low_estimated_dice": "lower gate.target_dice",
}
"""The setting that lets masks pass which are dropped for a reason."""


def why_none_is_kept(reasons: Sequence[str]) -> str:
    """The most frequent reason of a round that kept no mask, and what helps against it."""
    reason, count = Counter(reasons).most_common(1)[0] if reasons else ("nothing to mine", 0)
    cure = f"{LIMITS[reason]}, " if reason in LIMITS else ""
    return (
        f"most often {reason} ({count} of {len(reasons)}); {cure}label more images, train longer (fit.steps), or begin "
        "with ImageNet weights (--model.encoder_weights hub)"
    )


def gate(
    probs: Probs,
    prompts: Prompts,
    candidate: Candidate,
    *,
    area_prior: Mapping[int, float],
    image_label: int | None,
    cfg: GateConfig,
    calibration: Calibration | None = None,
    auxiliary_probs: Probs | None = None,
) -> Decision:
    """Keep or drop the candidate of one object.

    With a calibration, empty candidates and contradictions of the image-level label are dropped, and of the rest those
    of too low an estimated Dice. The segmenter's or the local model's mask is used, by the higher estimate. Without a
    calibration, thresholds on the evidence decide.

    Args:
        probs: of the local model, for the whole image.
        prompts, candidate: of the object; the candidate's best mask counts.
        area_prior: per class, the median share of the image that one labeled object covers.
        image_label: 0: the image has no lesion, so nothing is kept.
        cfg: the thresholds.
        calibration: estimates Dice from the evidence.
        auxiliary_probs: of the auxiliary model, if there is one.

    Returns:
        The decision; its reason is the first failed check, its evidence has every score in any case.
    """
    evidence = collect_evidence(probs, prompts, candidate, area_prior, auxiliary_probs)
    if calibration is None:
        reason = _first_reason(evidence, candidate, image_label, cfg)
        return Decision(kept=reason == "kept", reason=reason, evidence=evidence)
    empty = not candidate.masks[candidate.best].any()
    segmenter_dice = 0.0 if empty else calibration.segmenter.estimate(evidence)
    local_dice = float("nan") if prompts.component is None else calibration.local.estimate(evidence)
    use_local = local_dice >= segmenter_dice + cfg.margin
    estimated = local_dice if use_local else segmenter_dice
    if empty and not use_local:
        reason = "empty_candidate"
    elif image_label == 0:
        reason = "contradicts_image_label"
    elif estimated < calibration.guarantee.threshold:
        reason = "low_estimated_dice"
    else:
        reason = "kept_local" if use_local else "kept"
    source = "local" if use_local else "both" if segmenter_dice < local_dice + cfg.margin else "segmenter"
    return Decision(reason in ("kept", "kept_local"), reason, evidence, estimated, segmenter_dice, local_dice, source)


def collect_evidence(
    probs: Probs,
    prompts: Prompts,
    candidate: Candidate,
    area_prior: Mapping[int, float],
    auxiliary_probs: Probs | None = None,
) -> Evidence:
    """Every score of one candidate; see `Evidence`."""
    best, prob = candidate.masks[candidate.best], probs.probs[prompts.class_id]
    auxiliary = None if auxiliary_probs is None else auxiliary_probs.mask == prompts.class_id
    return Evidence(
        predicted_iou=float(candidate.predicted_iou[candidate.best]),
        stability_score=float(candidate.stability_score[candidate.best]),
        agreement_iou=metrics.iou(best, prompts.component) if prompts.component is not None else float("nan"),
        jitter_dice=metrics.mean_pairwise_dice(np.concatenate([best[None], candidate.jittered_masks])),
        confidence_inside=_mean(prob[best]),
        confidence_outside=_mean(prob[_box_area(prompts, best) & ~best]),
        area_ratio=float(best.mean()) / area_prior[prompts.class_id] if prompts.class_id in area_prior else np.nan,
        tta_std=_mean(probs.tta_std[best]) if probs.tta_std is not None else float("nan"),
        auxiliary_dice=_auxiliary_dice(auxiliary, best, prompts) if auxiliary is not None else float("nan"),
    )


def _auxiliary_dice(auxiliary_mask: Bool, best: Bool, prompts: Prompts) -> float:
    """Dice of the candidate with the auxiliary components that touch it or the local one; 0 without any."""
    region = best if prompts.component is None else best | prompts.component
    touching = [component for component in masks.components(auxiliary_mask) if (component & region).any()]
    return metrics.dice(np.any(touching, axis=0), best) if touching else 0.0


def _first_reason(e: Evidence, candidate: Candidate, image_label: int | None, cfg: GateConfig) -> str:
    checks = (
        ("empty_candidate", not candidate.masks[candidate.best].any()),
        ("low_predicted_iou", e.predicted_iou < cfg.min_predicted_iou),
        ("low_stability", e.stability_score < cfg.min_stability),
        ("low_agreement", e.agreement_iou < cfg.min_agreement),
        ("low_jitter_dice", e.jitter_dice < cfg.min_jitter_dice),
        ("low_confidence", e.confidence_inside < cfg.min_confidence),
        ("high_confidence_outside", e.confidence_outside > cfg.max_confidence_outside),
        ("high_tta_std", e.tta_std > cfg.max_tta_std),
        ("area_outlier", e.area_ratio > cfg.max_area_ratio or e.area_ratio < cfg.max_area_ratio**-2),
        ("contradicts_image_label", image_label == 0),
    )  # comparisons with NaN are False, so unknown scores pass
    return next((reason for reason, failed in checks if failed), "kept")


def _box_area(prompts: Prompts, best: Bool) -> Bool:
    """(H, W): pixels of the prompt's box, or without one of the mask's own box."""
    inside = np.zeros(best.shape, bool)
    if prompts.box is None and not best.any():
        return inside
    box = prompts.box if prompts.box is not None else masks.tight_box(best)
    x0, y0, x1, y1 = np.rint(box).astype(int)
    inside[y0 : y1 + 1, x0 : x1 + 1] = True
    return inside


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean()) if values.size else float("nan")
