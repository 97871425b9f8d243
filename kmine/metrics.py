"""Dice, IoU, HD95 and missed lesions, per case, from counts.

Rules, for one class of one case:
- truth and prediction empty: not a number; left out of means, and counted (`Metrics.num_empty`).
- truth present, prediction empty (a miss): Dice 0, IoU 0, HD95 = the image diagonal, `num_missed` + 1.
- truth empty, prediction present (a false alarm): Dice 0, IoU 0, HD95 = the image diagonal.
A case's figure is the mean over the foreground classes that have one; a table's figure is the mean over cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kmine.records import IGNORE_INDEX, CaseMetrics, Metrics

Bool = NDArray[np.bool_]


def diagonal(shape: tuple[int, int], spacing: tuple[float, float] | None = None) -> float:
    """Length of the image diagonal, in mm where the spacing (row, column) is known, else in pixels."""
    row, col = spacing or (1.0, 1.0)
    return float(np.hypot(shape[0] * row, shape[1] * col))


def iou(a: Bool, b: Bool) -> float:
    """Intersection over union; NaN where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else float("nan")


def dice(a: Bool, b: Bool) -> float:
    """2 |a b| / (|a| + |b|); NaN where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else float("nan")


def mean_pairwise_dice(masks: Bool) -> float:
    """Mean Dice over the pairs of (M, H, W) masks; NaN for fewer than two masks or where no pair has foreground."""
    values = [dice(a, b) for a, b in combinations(masks, 2)]
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def hd95(pred: Bool, truth: Bool, spacing: tuple[float, float] | None = None) -> float:
    """95th percentile Hausdorff distance between two (H, W) masks.

    The larger of the two directed 95th percentiles of surface distances (MONAI's `compute_hausdorff_distance`), in mm
    where `spacing` (row, column) is given, else in pixels. NaN where both are empty; the image diagonal where one is,
    so that missing a lesion costs.
    """
    if not pred.any() and not truth.any():
        return float("nan")
    if not pred.any() or not truth.any():
        return diagonal(pred.shape, spacing)
    import torch
    from monai.metrics import compute_hausdorff_distance

    # Both masks are cropped to their common box (with a margin): the distance is the same, the work is not.
    rows, cols = np.flatnonzero((pred | truth).any(axis=1)), np.flatnonzero((pred | truth).any(axis=0))
    window = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    pair = [torch.from_numpy(np.pad(m[window], 1))[None, None].float() for m in (pred, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
        value = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=list(spacing or (1.0, 1.0))
        )
    return float(value.item())


def case_metrics(
    sample_id: str,
    pred: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    num_classes: int,
    spacing: tuple[float, float] | None = None,
    *,
    with_hd95: bool = True,
) -> CaseMetrics:
    """Metrics of one case from (H, W) class ids; pixels where the truth is 255 are left out on both sides.

    `with_hd95=False` leaves HD95 not a number: the distance is what costs, and choosing a checkpoint needs none.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"{sample_id}: prediction {pred.shape} and truth {truth.shape} must have the same shape")
    valid = truth != IGNORE_INDEX
    rows: list[tuple[float, float, float]] = []
    num_missed = 0
    for class_id in range(1, num_classes):
        p, t = (pred == class_id) & valid, truth == class_id
        num_missed += int(t.any() and not p.any())
        rows.append((dice(p, t), iou(p, t), hd95(p, t, spacing) if with_hd95 else float("nan")))
    columns = [_nanmean(column) for column in zip(*rows, strict=True)]
    return CaseMetrics(sample_id, *columns, num_missed=num_missed)


def summarise(cases: Iterable[CaseMetrics]) -> Metrics:
    """Mean over the cases; those that are empty on both sides are counted, not averaged."""
    cases = tuple(cases)
    return Metrics(
        cases=cases,
        dice=_nanmean([c.dice for c in cases]),
        iou=_nanmean([c.iou for c in cases]),
        hd95=_nanmean([c.hd95 for c in cases]),
        num_missed=sum(c.num_missed for c in cases),
        num_empty=sum(bool(np.isnan(c.dice)) for c in cases),
    )


def _nanmean(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
