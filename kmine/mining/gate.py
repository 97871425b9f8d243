"""Which candidates become pseudo-labels: the evidence, and decisions by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.config import GateConfig
from kmine.mining.rank import TIE, Ranking
from kmine.ops import masks, metrics
from kmine.ops.calibrator import Calibration
from kmine.types import Bool, Candidate, Decision, Evidence, Probs, Prompts


class Beside(NamedTuple):
    """What else is predicted at the place of a candidate; agreement with it is evidence."""

    auxiliary: Probs | None = None
    """Of the auxiliary model, if there is one."""
    slices: Sequence[NDArray[np.uint8]] = ()
    """(H, W) class ids that the local model predicts on neighbouring slices, if the image is a slice."""


NOTHING = Beside()
CURES = {"low_estimated_dice": "lower gate.target_dice", "low_rank": "raise gate.keep"}
"""The setting that lets masks pass which are dropped for a reason."""


def why_none_is_kept(reasons: Sequence[str]) -> str:
    """The most frequent reason of a round that kept no mask, and what helps against it."""
    reason, count = Counter(reasons).most_common(1)[0] if reasons else ("nothing to mine", 0)
    cure = f"{CURES[reason]}, " if reason in CURES else ""
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
    calibration: Calibration | Ranking | None = None,
    beside: Beside = NOTHING,
) -> Decision:
    """Keep or drop the candidate of one object.

    Empty candidates and contradictions of the image-level label are dropped. Of the rest, a calibration drops those of
    too low an estimated Dice, and uses the segmenter's or the local model's mask, by their estimated difference; a
    ranking drops those of too low a rank, and uses the segmenter's mask: without a calibration nothing says where it is
    wrong, and to ignore what it changes would leave the local model's own mask.

    Args:
        probs: of the local model, for the whole image.
        prompts, candidate: of the object; the candidate's best mask counts.
        area_prior: per class, the median share of the image that one labeled object covers.
        image_label: 0: the image shows nothing of the prompted class, so nothing is kept.
        cfg: the margin.
        calibration: what the gate goes by; None: everything else is kept.
        beside: other predictions at this place.

    Returns:
        The decision; its evidence has every score in any case.
    """
    evidence = collect_evidence(probs, prompts, candidate, area_prior, beside)
    empty = not candidate.masks[candidate.best].any()
    if isinstance(calibration, Calibration):
        return _by_estimate(evidence, calibration, cfg.margin, empty=empty, lesion_free=image_label == 0)
    if empty:
        reason = "empty_candidate"
    elif image_label == 0:
        reason = "contradicts_image_label"
    else:
        reason = "kept" if calibration is None or calibration.keeps(evidence) else "low_rank"
    return Decision(reason == "kept", reason, evidence, source="segmenter")


def _by_estimate(
    evidence: Evidence, calibration: Calibration, margin: float, *, empty: bool, lesion_free: bool
) -> Decision:
    # Of an empty candidate the local model's mask is used, if there is one.
    found = calibration.estimate(evidence, -math.inf if empty else margin)
    use_local, estimated, other = found.source == "local", found.dice, found.of_other
    if empty and not use_local:
        reason = "empty_candidate"
    elif lesion_free:
        reason = "contradicts_image_label"
    elif estimated < calibration.guarantee.threshold - TIE:
        reason = "low_estimated_dice"
    else:
        reason = "kept_local" if use_local else "kept"
    segmenter_dice, local_dice = (other, estimated) if use_local else (estimated, other)
    estimates = (estimated, 0.0 if empty else segmenter_dice, local_dice)
    return Decision(reason in ("kept", "kept_local"), reason, evidence, *estimates, found.source)


def collect_evidence(
    probs: Probs,
    prompts: Prompts,
    candidate: Candidate,
    area_prior: Mapping[int, float],
    beside: Beside = NOTHING,
) -> Evidence:
    """Every score of one candidate; see `Evidence`."""
    best, component = candidate.masks[candidate.best], prompts.component
    auxiliary = None if beside.auxiliary is None else beside.auxiliary.mask == prompts.class_id
    near = (mask == prompts.class_id for mask in beside.slices if mask.shape == best.shape)
    place = masks.window(best, component, *candidate.jittered_masks)
    inside, prob = best[place], probs.probs[prompts.class_id]
    share = int(np.count_nonzero(inside)) / best.size
    return Evidence(
        predicted_iou=float(candidate.predicted_iou[candidate.best]),
        stability_score=float(candidate.stability_score[candidate.best]),
        agreement_iou=metrics.iou(inside, component[place]) if component is not None else float("nan"),
        jitter_dice=metrics.mean_pairwise_dice([inside, *(mask[place] for mask in candidate.jittered_masks)]),
        confidence_inside=_mean(prob[place][inside]),
        confidence_outside=_mean_outside(prob, prompts, best),
        area_ratio=share / area_prior[prompts.class_id] if prompts.class_id in area_prior else np.nan,
        tta_std=_mean(probs.tta_std[place][inside]) if probs.tta_std is not None else float("nan"),
        auxiliary_dice=_touching_dice(auxiliary, best, prompts) if auxiliary is not None else float("nan"),
        slice_dice=max((_touching_dice(mask, best, prompts) for mask in near), default=float("nan")),
    )


def _touching_dice(other: Bool, best: Bool, prompts: Prompts) -> float:
    """Dice of the candidate with the components of another mask that touch it or the local one; 0 without any."""
    region = best if prompts.component is None else best | prompts.component
    touching = [component for component in masks.components(other) if (component & region).any()]
    return metrics.dice(np.any(touching, axis=0), best) if touching else 0.0


def _mean_outside(prob: NDArray[np.float32], prompts: Prompts, best: Bool) -> float:
    """Mean probability outside the mask in the prompt's box, or without one in the mask's own box."""
    if prompts.box is None and not best.any():
        return float("nan")
    box = prompts.box if prompts.box is not None else masks.tight_box(best)
    x0, y0, x1, y1 = np.rint(box).astype(int)
    place = slice(y0, y1 + 1), slice(x0, x1 + 1)
    return _mean(prob[place][~best[place]])


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean()) if values.size else float("nan")
