"""Rank masks by how likely they are wrong, without ground truth.

Signals: disagreement with held-out models, low estimated quality, unusual size, place or shape, weak edges.

A model trained on a mask tends to reproduce it, so only models not trained on it are used (`held_out_models`). A model
whose predictions prompted the segmenter for the mask has influenced it: it is a fallback.

Disagreement is counted as in confident learning (`kmine.audit.label_issues`). The other signals, and their combination,
are kmine's own.

Legend: N masks, K classes with background 0, H, W height and width, F features of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.audit.label_issues import ConfidentDisagreement
from kmine.ops.masks import components
from kmine.ops.metrics import nanmean
from kmine.store.tables import DecisionRow
from kmine.types import IGNORE_INDEX, Evidence

Signals = Mapping[str, float]
"""Value by signal name (keys of `WEIGHTS`); higher is more suspicious, NaN where unknown."""
WEIGHTS: dict[str, float] = {
    "conflict": 8.0, "unlike": 8.0, "doubt": 1.0, "disagreement": 0.2,
    "area": 0.2, "position": 0.1, "shape": 0.1, "edge": 0.5,
}  # fmt: skip
"""Weights of the signals' ranks in their mean, for pseudo masks; chosen on two runs (experiments/pseudo_label_audit).
Conflict alone is best at planted faults; overlap and doubt add most of what is found of the masks that mining itself
gets wrong. The small weights decide where no held-out model is there."""
GIVEN_WEIGHTS = {"conflict": 6.0, "unlike": 0.0, "area": 1.0, "position": 0.5, "shape": 0.5, "edge": 3.0}
"""Weights for given masks. Only one held-out model, trained on part of a few labels, is available for each. Its soft
Dice with a mask (`unlike`) depends more on that model than on the mask."""
MIN_NAMED_RANK = 0.8
"""Lowest rank of a signal that is listed as an explanation."""
SHAPE_FEATURES = ("area", "x", "y", "length", "roughness", "parts")
"""Features of `shape_features`, in order."""
MIN_SCALE = 0.05
"""Smallest scale of a feature; avoids outliers among nearly equal values."""


class ReferenceModel(NamedTuple):
    """A trained model that predicts masks for comparison."""

    name: str
    trained_on: frozenset[str]
    """Samples whose masks, given or mined, were used in its training or in that of the model it started from."""
    prompted_rounds: frozenset[int]
    """Rounds in which its predictions prompted the segmenter."""


def held_out_models(models: Sequence[ReferenceModel], sample_id: str, round_idx: int) -> list[int]:
    """Indices of the models to compare with the mask of a sample mined in round `round_idx` (0: a given mask).

    None is trained on the mask; models that prompted the segmenter for it are used only if there is no other.
    """
    held_out = [n for n, model in enumerate(models) if sample_id not in model.trained_on]
    return [n for n in held_out if round_idx not in models[n].prompted_rounds] or held_out


def uncertainty_of(rows: Iterable[DecisionRow]) -> dict[str, float]:
    """`doubt` and `disagreement` of a mask from the decision rows of its kept objects: the maximum over the objects.

    Doubt is 1 minus the estimated Dice. Disagreement is the mean of the known values among: 1 minus the IoU of the
    local model's and the segmenter's mask, 1 minus the Dice of the masks of jittered boxes, 1 minus the Dice with the
    auxiliary model, and the standard deviation over test-time flips.
    """
    largest = {"doubt": math.nan, "disagreement": math.nan}
    for row in rows:
        scores = row.evidence or Evidence()
        doubt = math.nan if row.estimated_dice is None else 1 - row.estimated_dice
        parts = (1 - scores.agreement_iou, 1 - scores.jitter_dice, 1 - scores.auxiliary_dice, scores.tta_std)
        new = {"doubt": doubt, "disagreement": nanmean(parts)}
        largest = {name: float(np.fmax(largest[name], new[name])) for name in largest}
    return largest


def shape_features(mask: NDArray[np.uint8]) -> tuple[float, ...]:
    """(F,) `SHAPE_FEATURES` of the foreground of (H, W) class ids; NaN for an empty mask.

    Log share of the image, centre in shares of width and height, log of long over short axis, log of outline squared
    over 4 pi area (0: a disc), log number of components.
    """
    inside = (mask != 0) & (mask != IGNORE_INDEX)
    area = int(inside.sum())
    if not area:
        return (math.nan,) * len(SHAPE_FEATURES)
    (rows, cols), (height, width) = np.nonzero(inside), mask.shape
    spread = np.linalg.eigvalsh(np.cov(np.stack([rows, cols]).astype(float), bias=True) + np.eye(2) / 12)
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = sum(cv2.arcLength(contour, True) for contour in contours) + 4
    return (
        math.log(area / mask.size),
        float(cols.mean()) / width,
        float(rows.mean()) / height,
        0.5 * math.log(spread[1] / spread[0]),
        math.log(outline**2 / (4 * math.pi * area)),
        math.log(len(components(inside))),
    )


def outliers(shapes: NDArray[np.float64], *references: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Robust z-scores of (N, F) shapes: (N,) each for area, position and shape.

    Deviation from the median of a reference (M, F), in units of 1.4826 times its median absolute deviation. With
    several references the largest score counts. NaN for an empty mask, and if no reference has a mask.
    """
    zs = np.full(shapes.shape, np.nan)
    for reference in references:
        if not len(reference) or np.isnan(reference).all():
            continue
        middle = np.nanmedian(reference, axis=0)
        scale = np.maximum(1.4826 * np.nanmedian(np.abs(reference - middle), axis=0), MIN_SCALE)
        zs = np.fmax(zs, np.abs(shapes - middle) / scale)
    empty = np.isnan(zs).all(axis=1)
    filled = np.where(np.isnan(zs), 0.0, zs)
    scores = {"area": filled[:, 0], "position": filled[:, 1:3].max(axis=1), "shape": filled[:, 3:].max(axis=1)}
    return {name: np.where(empty, np.nan, values) for name, values in scores.items()}


def contradicts_image_label(mask: NDArray[np.uint8], image_label: int | None, num_classes: int) -> bool:
    """Whether a mask shows the last class (lesion) in an image labeled lesion-free, or lacks it in one with a lesion.

    Ignored pixels may hold the lesion, so a mask with ignored pixels never lacks it.
    """
    if image_label is None:
        return False
    shows = bool((mask == num_classes - 1).any())
    return shows if image_label == 0 else not shows and not (mask == IGNORE_INDEX).any()


def ranks(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) in (0, 1): share of the values below, ties counted half; 0.5 for NaN."""
    x = np.asarray(values, float)
    out, valid = np.full(len(x), 0.5), ~np.isnan(x)
    ordered = np.sort(x[valid])
    middle = np.searchsorted(ordered, x[valid], "left") + np.searchsorted(ordered, x[valid], "right")
    out[valid] = middle / 2 / max(len(ordered), 1)
    return out


def label_issue_scores(
    signals: Mapping[str, NDArray[np.float64]],
    contradicted: NDArray[np.bool_],
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """(N,) scores in [0, 1] and the (N,) ranks of each signal; `signals`: (N,) values by name, `contradicted`: (N,).

    A score is the weighted mean of the ranks, or 1 if the image-level label is contradicted. Signals that are NaN for
    all masks are left out.
    """
    known = [name for name in weights if name in signals and not np.isnan(signals[name]).all()]
    signal_ranks = {name: ranks(signals[name]) for name in known}
    total = sum(weights[name] for name in known)
    mean = sum((weights[name] * signal_ranks[name] for name in known), np.zeros(len(contradicted)))
    mean = mean / total if total else np.full(len(contradicted), 0.5)
    return np.where(contradicted, 1.0, mean), signal_ranks


def rank_order(scores: NDArray[np.float64], names: Sequence[str]) -> list[int]:
    """Indices by descending score; ties in the order of names."""
    return sorted(range(len(names)), key=lambda n: (-scores[n], names[n]))


def explanations(
    signals: Signals,
    signal_ranks: Mapping[str, float],
    contradicted: bool,
    conflict: ConfidentDisagreement | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[str, ...]:
    """Reasons for suspicion, `tag: detail`, the most important first; `signal_ranks`: rank by signal name."""
    texts = ["image label: the mask contradicts it"] if contradicted else []
    high = [name for name, rank in signal_ranks.items() if rank >= MIN_NAMED_RANK and not math.isnan(signals[name])]
    high.sort(key=lambda name: -weights[name] * (signal_ranks[name] - 0.5))
    texts += [_explanation(name, signals[name], conflict) for name in high]
    return tuple(filter(None, dict.fromkeys(texts)))


def _explanation(name: str, value: float, conflict: ConfidentDisagreement | None) -> str:
    if name == "conflict" and conflict is not None and value > 0:
        parts = []
        if conflict.mislabeled > 0:
            parts.append(f"{conflict.mislabeled:.0%} of the mask is confidently another class")
        if conflict.missed > 0:
            parts.append(f"{conflict.missed:.0%} of what they are sure of is outside of it")
        return "models: those not trained on it disagree, " + ", ".join(parts) if parts else ""
    return {
        "unlike": f"overlap: low with models not trained on it (soft Dice {1 - value:.2f})",
        "doubt": f"estimate: low Dice is expected ({1 - value:.2f})",
        "disagreement": f"prompts: local model, segmenter and jittered prompts disagree ({value:.2f})",
        **{n: f"{tag}: {value:.1f} deviations from the usual" if value > 1 else "" for n, tag in _USUAL.items()},
        "edge": "edges: its outline does not follow those of the image",
    }.get(name, "")


_USUAL = {"area": "size", "position": "position", "shape": "shape"}
"""Tags of the signals that are deviations from the other masks."""
