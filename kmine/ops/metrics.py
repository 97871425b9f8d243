"""Dice, IoU, HD95 and missed lesions, per case, from counts.

Rules for one class of one case:

- truth and prediction empty: NaN; excluded from means and counted (`Metrics.num_empty`). Means of two methods then have
  different denominators: `LesionMetrics` and `CaseMetrics.score` have not.
- truth present, prediction empty (a miss): Dice 0, IoU 0, HD95 = the image diagonal, `num_missed` + 1.
- truth empty, prediction present (a false alarm): Dice 0, IoU 0, HD95 = the image diagonal.

A case is an image or a volume; for a volume the pixels of all slices are counted before division.
A case's figure is the mean over the foreground classes that have one; a table's figure is the mean over cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.types import IGNORE_INDEX, Bool, CaseMetrics, Metrics, none_to_nan


def diagonal(shape: tuple[int, int], spacing: tuple[float, float] | None = None) -> float:
    """Length of the image diagonal, in mm with a spacing (row, column), else in pixels."""
    row, col = spacing or (1.0, 1.0)
    return float(np.hypot(shape[0] * row, shape[1] * col))


def iou(a: Bool, b: Bool) -> float:
    """Intersection over union; NaN where both are empty."""
    return _iou(*_count(a, b))


def dice(a: Bool, b: Bool) -> float:
    """``2 |a & b| / (|a| + |b|)``; NaN where both are empty."""
    return _dice(*_count(a, b))


def _count(a: Bool, b: Bool) -> tuple[int, int, int]:
    """Pixels in both, in `a`, in `b`."""
    return int(np.count_nonzero(a & b)), int(np.count_nonzero(a)), int(np.count_nonzero(b))


def _iou(both: int, in_a: int, in_b: int) -> float:
    union = in_a + in_b - both
    return both / union if union else float("nan")


def _dice(both: int, in_a: int, in_b: int) -> float:
    total = in_a + in_b
    return 2 * both / total if total else float("nan")


def mean_pairwise_dice(masks: Sequence[Bool] | Bool) -> float:
    """Mean Dice over the pairs of M masks (H, W); NaN for fewer than two masks or where no pair has foreground."""
    return nanmean(dice(a, b) for a, b in combinations(masks, 2))


def hd95(pred: Bool, truth: Bool, spacing: tuple[float, float] | None = None) -> float:
    """95th percentile Hausdorff distance between two (H, W) masks.

    The larger of the two directed 95th percentiles of surface distances (edges and distances by MONAI), in mm with a
    `spacing` (row, column), else in pixels. NaN where both are empty. The image diagonal where one is, so that a
    missed lesion is penalised.
    """
    if not pred.any() and not truth.any():
        return float("nan")
    if not pred.any() or not truth.any():
        return diagonal(pred.shape, spacing)
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    # Cropping both masks to their common box leaves the distances unchanged and saves time.
    rows, cols = np.flatnonzero((pred | truth).any(axis=1)), np.flatnonzero((pred | truth).any(axis=0))
    window = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    pair = [torch.from_numpy(np.pad(m[window], 1)) for m in (pred, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
        _, distances, _ = get_edge_surface_distance(*pair, spacing=list(spacing or (1.0, 1.0)), symmetric=True)
    # MONAI's own percentile interpolates in single precision.
    return max(float(np.percentile(d.numpy().astype(float), 95)) for d in distances)


def case_metrics(
    sample_id: str,
    pred: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    num_classes: int,
    spacing: tuple[float, float] | None = None,
    *,
    with_hd95: bool = True,
) -> CaseMetrics:
    """Metrics of one case from (H, W) class ids; pixels where the truth is 255 are excluded on both sides.

    `with_hd95=False` sets HD95 to NaN: distances are slow, and the choice of a checkpoint needs none.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"{sample_id}: prediction {pred.shape} and truth {truth.shape} must have the same shape")
    valid = truth != IGNORE_INDEX
    pairs = [((pred == class_id) & valid, truth == class_id) for class_id in range(1, num_classes)]
    distances = [hd95(p, t, spacing) if with_hd95 else float("nan") for p, t in pairs]
    return _case(sample_id, [_count(p, t) for p, t in pairs], distances)


def pool_cases(case_id: str, slices: Sequence[CaseMetrics]) -> CaseMetrics:
    """Slices of one volume as one case: Dice, IoU and misses from the pixels of all slices together.

    HD95 remains a distance within slices: the mean over those that have one.

    Raises:
        ValueError: slices without counts, or with different numbers of classes.
    """
    if not slices or not all(case.counts and len(case.counts) == len(slices[0].counts) for case in slices):
        raise ValueError(f"{case_id}: expected slices that all have counts of the same classes")
    counts = [tuple(int(n) for n in row) for row in np.sum([case.counts for case in slices], axis=0)]
    return _case(case_id, counts, [case.hd95 for case in slices])


def _case(case_id: str, counts: Sequence[tuple[int, int, int]], distances: Sequence[float]) -> CaseMetrics:
    return CaseMetrics(
        case_id,
        dice=nanmean([_dice(*row) for row in counts]),
        iou=nanmean([_iou(*row) for row in counts]),
        hd95=nanmean(distances),
        num_missed=sum(in_truth > 0 and in_pred == 0 for _, in_pred, in_truth in counts),
        counts=tuple(counts),
    )


def summarise(cases: Iterable[CaseMetrics]) -> Metrics:
    """Mean over the cases; those empty on both sides are counted, not averaged."""
    cases = tuple(cases)
    return Metrics(
        cases=cases,
        dice=nanmean([c.dice for c in cases]),
        iou=nanmean([c.iou for c in cases]),
        hd95=nanmean([c.hd95 for c in cases]),
        num_missed=sum(c.num_missed for c in cases),
        num_empty=sum(bool(np.isnan(c.dice)) for c in cases),
    )


@dataclass(frozen=True)
class LesionMetrics:
    """Figures whose denominators depend on the truth alone, so that those of two methods can be compared."""

    dice_lesion: float
    """Mean Dice where there is a lesion: over the classes in the truth, then over the cases with one."""
    num_clean: int
    """Foreground classes that a case's truth lacks: with one class, clean images."""
    false_alarm_rate: float
    """Share of `num_clean` with a prediction; NaN without any."""


def lesion_metrics(metrics: Metrics) -> LesionMetrics:
    """Figures by the truth; unknown (NaN, 0) if a case has no counts."""
    cases = [case.counts for case in metrics.cases]
    if not all(cases):
        return LesionMetrics(float("nan"), 0, float("nan"))
    clean = [found > 0 for case in cases for _, found, truth in case if not truth]
    dice = nanmean(nanmean([_dice(*row) for row in case if row[2]]) for case in cases)
    return LesionMetrics(dice, len(clean), nanmean(clean))


def of_one_kind(*several: Metrics) -> list[Metrics]:
    """The metrics, all without counts if a case of any has none, so that their scores can be compared."""
    if all(case.counts for metrics in several for case in metrics.cases):
        return list(several)
    return [replace(m, cases=tuple(replace(case, counts=()) for case in m.cases)) for m in several]


class Correction(NamedTuple):
    """What pseudo masks change in the local model's own masks, in pixels; sums over images are sums of fields."""

    wrong: int
    """Pixels that the local model classifies wrongly."""
    corrected: int
    """Of these, pixels that the pseudo mask has right."""
    broken: int
    """Pixels that the local model has right and the pseudo mask wrong."""

    @classmethod
    def total(cls, parts: Iterable[Correction]) -> Correction:
        """The sum over images."""
        return cls(*map(sum, zip(cls(0, 0, 0), *parts, strict=True)))

    @property
    def shares(self) -> tuple[float, float]:
        """Pixels corrected and newly broken, each per wrong pixel of the local model; NaN without any."""
        return (self.corrected / self.wrong, self.broken / self.wrong) if self.wrong else (float("nan"),) * 2


def correction(local: NDArray[np.uint8], pseudo: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Correction:
    """Compare (H, W) class ids of the local model and of a pseudo mask with the truth.

    Pixels ignored by the pseudo mask are neither corrected nor broken; those ignored by the truth do not count.
    """
    wrong = (local != truth) & (truth != IGNORE_INDEX)
    broken = (local == truth) & (pseudo != truth) & (pseudo != IGNORE_INDEX)
    return Correction(*(int(np.count_nonzero(pixels)) for pixels in (wrong, wrong & (pseudo == truth), broken)))


def correction_text(shares: Sequence[float | None] | None) -> str:
    """`46 % / 8 %`: wrong pixels of the local model that are corrected, and newly broken ones; a dash if unknown."""
    known = [share for share in shares or () if share is not None and not np.isnan(share)]
    return " / ".join(f"{share:.0%}".replace("%", " %") for share in known) or "–"


def metrics_from_json(saved: Mapping[str, Any]) -> Metrics:
    """Metrics from their JSON form, in which NaN is null; means are computed from the cases again."""
    return summarise(CaseMetrics(**case) for case in none_to_nan(saved["cases"]))


def nanmean(values: Iterable[float | None]) -> float:
    """Mean of the values that are neither None nor NaN; NaN if there is none (without NumPy's warning)."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
