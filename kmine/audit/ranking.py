"""Which masks look wrong, told without truth: conflict with innocent models, doubts of the gate, odd sizes and shapes.

A model that learned a mask agrees with it, right or wrong, so it bears no witness. Innocent of a mask is a model that
was not taught with it. One that was taught without it but whose predictions prompted the segmenter for it has its
opinion in the mask already: it is heard only where nobody else is there (`held_out_models`).

Conflict is counted as in confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning"): a pixel counts
where the models say another class with at least the probability that this class usually gets where it is right. The
rest, and how all is put together, is ours.

Legend: N masks, K classes with background 0, H, W height and width, F features of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.ops.masks import components
from kmine.types import IGNORE_INDEX

Signals = Mapping[str, float]
"""By the names of `WEIGHTS`; the higher, the more suspicious, NaN where it could not be had."""
WEIGHTS: dict[str, float] = {
    "conflict": 8.0,
    "unlike": 2.0,
    "doubt": 2.0,
    "disagreement": 1.0,
    "area": 1.0,
    "position": 0.5,
    "shape": 0.5,
    "edge": 4.0,
}
"""Of the rank of each signal in the weighted mean, for pseudo masks; chosen on planted faults
(experiments/pseudo_label_audit), where conflict alone finds most. Doubt and disagreement, which it has no use for, tell
most of the masks that mining itself gets wrong."""
GIVEN_WEIGHTS: dict[str, float] = {
    "conflict": 6.0,
    "unlike": 0.0,
    "area": 1.0,
    "position": 0.5,
    "shape": 0.5,
    "edge": 3.0,
}
"""For given masks. One model, taught with a part of few labels, bears witness there: how sure it is by and large says
more of that model than of the mask."""
MIN_NAMED_RANK = 0.8
"""Rank from which on a signal is named as a cause."""
SHAPE_FEATURES = ("area", "x", "y", "length", "roughness", "parts")
"""What `shape_features` tells of a mask."""
MIN_SCALE = 0.05
"""Of a feature: below, values that are all alike would make outliers of nothing."""


class ReferenceModel(NamedTuple):
    """A model that may be asked about masks."""

    name: str
    trained_on: frozenset[str]
    """Samples whose masks, given or mined, it was taught with, in its own training or that of a model before it."""
    prompted_rounds: frozenset[int]
    """Rounds in which it prompted the segmenter."""


class ConfidentDisagreement(NamedTuple):
    """What innocent models say against a mask; shares in [0, 1]."""

    mislabeled: float
    """Of the mask's foreground, the share that is confidently of another class; NaN for an empty mask."""
    missed: float
    """Of what is confidently foreground, the share that the mask has as background; NaN where nothing is."""
    conflict: float
    """Pixels of either kind, of all that the mask or a confident model has as foreground."""
    soft_dice_distance: float
    """1 minus the Dice of the mask with the probabilities as they are."""


def held_out_models(models: Sequence[ReferenceModel], sample_id: str, round_idx: int) -> list[int]:
    """Which witnesses may speak about the mask of a sample that was mined in a round (0: that was given).

    Never one that learned it; one that asked for it only where there is no other. Empty where all are guilty.
    """
    held_out = [n for n, model in enumerate(models) if sample_id not in model.trained_on]
    return [n for n in held_out if round_idx not in models[n].prompted_rounds] or held_out


class ConfidentThresholds:
    """Per class, the mean probability it gets where it is right: what counts as confident."""

    def __init__(self, num_classes: int) -> None:
        self._sums, self._counts = np.zeros(num_classes), np.zeros(num_classes)

    def add(self, probs: NDArray[np.float32], truth: NDArray[np.uint8]) -> None:
        """One image: (K, H, W) of models that did not learn it, (H, W) true class ids."""
        for class_id in range(len(self._sums)):
            is_class = truth == class_id
            self._sums[class_id] += float(probs[class_id][is_class].sum(dtype=float))
            self._counts[class_id] += int(is_class.sum())

    def thresholds(self) -> NDArray[np.float64]:
        """(K,); 0.5 for a class that was not seen."""
        return np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), 0.5)


def confident_disagreement(
    probs: NDArray[np.float32], mask: NDArray[np.uint8], thresholds: NDArray[np.float64]
) -> ConfidentDisagreement:
    """Hold (H, W) class ids, 255 where nothing is claimed, against (K, H, W) probabilities of innocent models."""
    valid, predicted = mask != IGNORE_INDEX, probs.argmax(axis=0)
    confident = valid & (probs.max(axis=0) >= thresholds[predicted])
    inside = valid & (mask != 0)
    num_mislabeled = int((inside & confident & (predicted != mask)).sum())
    predicted_foreground = confident & (predicted != 0)
    num_missed = int((predicted_foreground & (mask == 0)).sum())
    num_foreground = int(inside.sum())
    overlap = sum(float(probs[k][mask == k].sum(dtype=float)) for k in range(1, len(probs)))
    total = float((1 - probs[0])[valid].sum(dtype=float)) + num_foreground
    return ConfidentDisagreement(
        mislabeled=num_mislabeled / num_foreground if num_foreground else math.nan,
        missed=num_missed / int(predicted_foreground.sum()) if predicted_foreground.any() else math.nan,
        conflict=(num_mislabeled + num_missed) / (num_foreground + num_missed) if num_foreground + num_missed else 0.0,
        soft_dice_distance=1 - 2 * overlap / total if total > 0 and num_foreground else (1.0 if num_missed else 0.0),
    )


def uncertainty_of(rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """`doubt` and `disagreement` of one mask, from the rows of the table of decisions of its kept objects.

    The worst object counts. Doubt is 1 minus the estimated Dice; disagreement the mean of what is known of: 1 minus
    the IoU of the local model's and the segmenter's mask, 1 minus the Dice of answers to shaken boxes, 1 minus the
    Dice with a second local model, and the deviation over test-time flips.
    """
    doubts, disagreements = [math.nan], [math.nan]
    for row in rows:
        doubts.append(1 - _number(row.get("estimated_dice")))
        parts = [1 - _number(row.get(name)) for name in ("agreement_iou", "jitter_dice", "witness_dice")]
        parts = [value for value in (*parts, _number(row.get("tta_std"))) if not math.isnan(value)]
        disagreements.append(float(np.mean(parts)) if parts else math.nan)
    return {"doubt": _largest(doubts), "disagreement": _largest(disagreements)}


def shape_features(mask: NDArray[np.uint8]) -> tuple[float, ...]:
    """(F,) of the foreground of (H, W) class ids: `SHAPE_FEATURES`; NaN for an empty mask.

    Log share of the image, centre in shares of width and height, log of long over short axis, log of outline squared
    over 4 pi area (0: a disc), log number of parts.
    """
    inside = (mask != 0) & (mask != IGNORE_INDEX)
    area = int(inside.sum())
    if not area:
        return (math.nan,) * len(SHAPE_FEATURES)
    rows, cols = np.nonzero(inside)
    height, width = mask.shape
    spread = np.linalg.eigvalsh(np.cov(np.stack([rows, cols]).astype(float), bias=True) + np.eye(2) / 12)
    grid = inside.astype(np.uint8)
    contours, _ = cv2.findContours(grid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
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
    """How far (N, F) shapes lie from what is usual, in robust deviations: (N,) each of area, position and shape.

    Usual is the median of a reference, (M, F), the deviation 1.4826 times the median distance from it; of several
    references the one counts in which a mask is odder. NaN for an empty mask and for references without any.
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
    """Whether a mask shows a lesion, the last class, in an image known to be free of it, or none where there is one.

    Ignored pixels may be anything: a mask that has any is not said to be without.
    """
    if image_label is None:
        return False
    shows = bool((mask == num_classes - 1).any())
    return shows if image_label == 0 else not shows and not (mask == IGNORE_INDEX).any()


def ranks(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) in (0, 1): the share of the others below, equals counting half; 0.5 where there is no value."""
    x = np.asarray(values, float)
    out, valid = np.full(len(x), 0.5), ~np.isnan(x)
    ordered = np.sort(x[valid])
    middle = np.searchsorted(ordered, x[valid], "left") + np.searchsorted(ordered, x[valid], "right")
    out[valid] = middle / 2 / max(len(ordered), 1)
    return out


def label_issue_scores(
    signals: Sequence[Signals], contradicted: Sequence[bool], weights: Mapping[str, float] = WEIGHTS
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """(N,) in [0, 1], and the ranks of each signal: the weighted mean of ranks, 1 where an image label is contradicted.

    A signal that no mask has does not take part.
    """
    by_name = {
        name: np.array([mask_signals.get(name, math.nan) for mask_signals in signals], float) for name in weights
    }
    available = {name: values for name, values in by_name.items() if len(values) and not np.isnan(values).all()}
    signal_ranks = {name: ranks(values) for name, values in available.items()}
    total = sum(weights[name] for name in signal_ranks)
    mean = sum((weights[name] * signal_ranks[name] for name in signal_ranks), np.zeros(len(signals)))
    mean = mean / total if total else np.full(len(signals), 0.5)
    return np.where(np.asarray(contradicted, bool), 1.0, mean), signal_ranks


def rank_order(scores: NDArray[np.float64], names: Sequence[str]) -> list[int]:
    """Indices, most suspicious first; equals by name."""
    return sorted(range(len(names)), key=lambda n: (-scores[n], names[n]))


def explanations(
    signals: Signals,
    signal_ranks: Mapping[str, float],
    contradicted: bool,
    conflict: ConfidentDisagreement | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[str, ...]:
    """What speaks against a mask, in words, the weightiest first; `signal_ranks`: the rank of each of its signals."""
    texts = ["contradicts the image-level label"] if contradicted else []
    prominent = [
        name for name, rank in signal_ranks.items() if rank >= MIN_NAMED_RANK and not math.isnan(signals[name])
    ]
    for name in sorted(prominent, key=lambda name: -weights[name] * (signal_ranks[name] - 0.5)):
        texts += [text for text in [_explanation(name, signals[name], conflict)] if text]
    return tuple(dict.fromkeys(texts))


def _explanation(name: str, value: float, conflict: ConfidentDisagreement | None) -> str:
    if name == "conflict" and conflict is not None and value > 0:
        parts = []
        if conflict.mislabeled > 0:
            parts.append(f"{conflict.mislabeled:.0%} of the mask is confidently something else")
        if conflict.missed > 0:
            parts.append(f"{conflict.missed:.0%} of what they surely see lies outside of it")
        return "models that did not learn it object: " + ", ".join(parts) if parts else ""
    return {
        "unlike": f"unlike what models say that did not learn it (overlap {1 - value:.2f})",
        "doubt": f"low estimated Dice ({1 - value:.2f})",
        "disagreement": f"local model, segmenter and shaken prompts disagree ({value:.2f})",
        "area": f"unusual size ({value:.1f} deviations)" if value > 1 else "",
        "position": f"unusual place ({value:.1f} deviations)" if value > 1 else "",
        "shape": f"unusual shape ({value:.1f} deviations)" if value > 1 else "",
        "edge": "its outline follows no edge of the image",
    }.get(name, "")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _largest(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return max(known) if known else math.nan
