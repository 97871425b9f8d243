"""Which masks look wrong, told without truth: conflict with innocent models, doubts of the gate, odd sizes and shapes.

A model that learned a mask agrees with it, right or wrong, so it bears no witness. Innocent of a mask is a model that
was not taught with it. One that was taught without it but whose predictions prompted the segmenter for it has its
opinion in the mask already: it is heard only where nobody else is there (`innocent`).

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
STANDS_OUT = 0.8
"""Rank from which on a signal is named as a cause."""
FEATURES = ("area", "x", "y", "length", "roughness", "parts")
"""What `shape_of` tells of a mask."""
MIN_SCALE = 0.05
"""Of a feature: below, values that are all alike would make outliers of nothing."""


class Witness(NamedTuple):
    """A model that may be asked about masks."""

    name: str
    learned: frozenset[str]
    """Samples whose masks, given or mined, it was taught with, in its own training or that of a model before it."""
    asked_in: frozenset[int]
    """Rounds in which it prompted the segmenter."""


class Conflict(NamedTuple):
    """What innocent models say against a mask; shares in [0, 1]."""

    otherwise: float
    """Of the mask's foreground, the share that is confidently of another class; NaN for an empty mask."""
    outside: float
    """Of what is confidently foreground, the share that the mask has as background; NaN where nothing is."""
    conflict: float
    """Pixels of either kind, of all that the mask or a confident model has as foreground."""
    unlike: float
    """1 minus the Dice of the mask with the probabilities as they are."""


def innocent(witnesses: Sequence[Witness], sample_id: str, round_idx: int) -> list[int]:
    """Which witnesses may speak about the mask of a sample that was mined in a round (0: that was given).

    Never one that learned it; one that asked for it only where there is no other. Empty where all are guilty.
    """
    free = [n for n, witness in enumerate(witnesses) if sample_id not in witness.learned]
    return [n for n in free if round_idx not in witnesses[n].asked_in] or free


class Confidence:
    """Per class, the mean probability it gets where it is right: what counts as confident."""

    def __init__(self, num_classes: int) -> None:
        self._sums, self._counts = np.zeros(num_classes), np.zeros(num_classes)

    def add(self, probs: NDArray[np.float32], truth: NDArray[np.uint8]) -> None:
        """One image: (K, H, W) of models that did not learn it, (H, W) true class ids."""
        for class_id in range(len(self._sums)):
            here = truth == class_id
            self._sums[class_id] += float(probs[class_id][here].sum(dtype=float))
            self._counts[class_id] += int(here.sum())

    def thresholds(self) -> NDArray[np.float64]:
        """(K,); 0.5 for a class that was not seen."""
        return np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), 0.5)


def find_conflict(probs: NDArray[np.float32], mask: NDArray[np.uint8], thresholds: NDArray[np.float64]) -> Conflict:
    """Hold (H, W) class ids, 255 where nothing is claimed, against (K, H, W) probabilities of innocent models."""
    known, seen = mask != IGNORE_INDEX, probs.argmax(axis=0)
    sure = known & (probs.max(axis=0) >= thresholds[seen])
    inside = known & (mask != 0)
    otherwise = int((inside & sure & (seen != mask)).sum())
    object_seen = sure & (seen != 0)
    outside = int((object_seen & (mask == 0)).sum())
    claimed = int(inside.sum())
    both = sum(float(probs[k][mask == k].sum(dtype=float)) for k in range(1, len(probs)))
    total = float((1 - probs[0])[known].sum(dtype=float)) + claimed
    return Conflict(
        otherwise=otherwise / claimed if claimed else math.nan,
        outside=outside / int(object_seen.sum()) if object_seen.any() else math.nan,
        conflict=(otherwise + outside) / (claimed + outside) if claimed + outside else 0.0,
        unlike=1 - 2 * both / total if total > 0 and claimed else (1.0 if outside else 0.0),
    )


def doubt_of(rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """`doubt` and `disagreement` of one mask, from the rows of the table of decisions of its kept objects.

    The worst object counts. Doubt is 1 minus the estimated Dice; disagreement the mean of what is known of: 1 minus
    the IoU of the local model's and the segmenter's mask, 1 minus the Dice of answers to shaken boxes, 1 minus the
    Dice with a second local model, and the deviation over test-time flips.
    """
    doubts, apart = [math.nan], [math.nan]
    for row in rows:
        doubts.append(1 - _number(row.get("estimated_dice")))
        parts = [1 - _number(row.get(name)) for name in ("agreement_iou", "jitter_dice", "witness_dice")]
        parts = [value for value in (*parts, _number(row.get("tta_std"))) if not math.isnan(value)]
        apart.append(float(np.mean(parts)) if parts else math.nan)
    return {"doubt": _largest(doubts), "disagreement": _largest(apart)}


def shape_of(mask: NDArray[np.uint8]) -> tuple[float, ...]:
    """(F,) of the foreground of (H, W) class ids: `FEATURES`; NaN for an empty mask.

    Log share of the image, centre in shares of width and height, log of long over short axis, log of outline squared
    over 4 pi area (0: a disc), log number of parts.
    """
    inside = (mask != 0) & (mask != IGNORE_INDEX)
    area = int(inside.sum())
    if not area:
        return (math.nan,) * len(FEATURES)
    rows, cols = np.nonzero(inside)
    height, width = mask.shape
    spread = np.linalg.eigvalsh(np.cov(np.stack([rows, cols]).astype(float), bias=True) + np.eye(2) / 12)
    grid = inside.astype(np.uint8)
    found, _ = cv2.findContours(grid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = sum(cv2.arcLength(one, True) for one in found) + 4
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
    found = {"area": filled[:, 0], "position": filled[:, 1:3].max(axis=1), "shape": filled[:, 3:].max(axis=1)}
    return {name: np.where(empty, np.nan, values) for name, values in found.items()}


def contradicts(mask: NDArray[np.uint8], image_label: int | None, num_classes: int) -> bool:
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
    out, known = np.full(len(x), 0.5), ~np.isnan(x)
    ordered = np.sort(x[known])
    middle = np.searchsorted(ordered, x[known], "left") + np.searchsorted(ordered, x[known], "right")
    out[known] = middle / 2 / max(len(ordered), 1)
    return out


def suspicion(
    signals: Sequence[Signals], contradicted: Sequence[bool], weights: Mapping[str, float] = WEIGHTS
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """(N,) in [0, 1], and the ranks of each signal: the weighted mean of ranks, 1 where an image label is contradicted.

    A signal that no mask has does not take part.
    """
    by_name = {name: np.array([one.get(name, math.nan) for one in signals], float) for name in weights}
    heard = {name: values for name, values in by_name.items() if len(values) and not np.isnan(values).all()}
    placed = {name: ranks(values) for name, values in heard.items()}
    total = sum(weights[name] for name in placed)
    mean = sum((weights[name] * placed[name] for name in placed), np.zeros(len(signals)))
    mean = mean / total if total else np.full(len(signals), 0.5)
    return np.where(np.asarray(contradicted, bool), 1.0, mean), placed


def order(found: NDArray[np.float64], names: Sequence[str]) -> list[int]:
    """Indices, most suspicious first; equals by name."""
    return sorted(range(len(names)), key=lambda n: (-found[n], names[n]))


def causes(
    signals: Signals,
    placed: Mapping[str, float],
    contradicted: bool,
    conflict: Conflict | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[str, ...]:
    """What speaks against a mask, in words, the weightiest first; `placed`: the rank of each of its signals."""
    said = ["contradicts the image-level label"] if contradicted else []
    loud = [name for name, place in placed.items() if place >= STANDS_OUT and not math.isnan(signals[name])]
    for name in sorted(loud, key=lambda name: -weights[name] * (placed[name] - 0.5)):
        said += [text for text in [_say(name, signals[name], conflict)] if text]
    return tuple(dict.fromkeys(said))


def _say(name: str, value: float, conflict: Conflict | None) -> str:
    if name == "conflict" and conflict is not None and value > 0:
        parts = []
        if conflict.otherwise > 0:
            parts.append(f"{conflict.otherwise:.0%} of the mask is confidently something else")
        if conflict.outside > 0:
            parts.append(f"{conflict.outside:.0%} of what they surely see lies outside of it")
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
