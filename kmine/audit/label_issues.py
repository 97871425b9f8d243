"""Confident learning on pixels: where held-out predictions contradict a label.

A pixel is contradicted where the predicted class is another one, with at least the mean probability that this class
has where it is correct (Northcutt, Jiang and Chuang 2021, "Confident Learning").

Legend: N images, K classes with background 0, H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kmine.types import IGNORE_INDEX


class ConfidentDisagreement(NamedTuple):
    """Pixels where held-out models confidently contradict a mask; shares in [0, 1]."""

    mislabeled: float
    """Share of the mask's foreground with a confident prediction of another class; NaN for an empty mask."""
    missed: float
    """Share of the confident foreground that is background in the mask; NaN without confident foreground."""
    conflict: float
    """Contradicted pixels over the pixels that are foreground in the mask or confident foreground."""
    soft_dice_distance: float
    """1 minus the soft Dice of the mask and the probabilities."""


def confident_thresholds(
    pairs: Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]], num_classes: int
) -> NDArray[np.float64]:
    """(K,) in [0, 1]: per class, its mean probability where it is correct; 0.5 for a class without pixels.

    `pairs`: by image, (K, H, W) probabilities of models not trained on it, and (H, W) true class ids.
    """
    sums, counts = np.zeros(num_classes), np.zeros(num_classes)
    for probs, truth in pairs:
        for class_id in range(num_classes):
            is_class = truth == class_id
            sums[class_id] += float(probs[class_id][is_class].sum(dtype=float))
            counts[class_id] += int(is_class.sum())
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.5)


def confident_classes(probs: NDArray[np.floating], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """(H, W) most probable class of (K, H, W) where it reaches its threshold, -1 elsewhere."""
    predicted = probs.argmax(axis=0)
    return np.where(probs.max(axis=0) >= thresholds[predicted], predicted, -1)


def confident_disagreement(
    probs: NDArray[np.float32], mask: NDArray[np.uint8], thresholds: NDArray[np.float64]
) -> ConfidentDisagreement:
    """Compare (H, W) class ids, 255 for ignored pixels, with (K, H, W) probabilities of held-out models."""
    valid, confident = mask != IGNORE_INDEX, confident_classes(probs, thresholds)
    inside = valid & (mask != 0)
    contradicted = valid & (confident >= 0) & (confident != mask)
    num_mislabeled, num_missed = int((contradicted & inside).sum()), int((contradicted & ~inside).sum())
    num_predicted, num_foreground = int((valid & (confident > 0)).sum()), int(inside.sum())
    overlap = sum(float(probs[k][mask == k].sum(dtype=float)) for k in range(1, len(probs)))
    total = float((1 - probs[0])[valid].sum(dtype=float)) + num_foreground
    return ConfidentDisagreement(
        mislabeled=num_mislabeled / num_foreground if num_foreground else math.nan,
        missed=num_missed / num_predicted if num_predicted else math.nan,
        conflict=(num_mislabeled + num_missed) / (num_foreground + num_missed) if num_foreground + num_missed else 0.0,
        soft_dice_distance=1 - 2 * overlap / total if total > 0 and num_foreground else (1.0 if num_missed else 0.0),
    )


def find_label_issues(
    labels: NDArray[np.integer], pred_probs: NDArray[np.floating], thresholds: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Find pixels whose label is confidently contradicted by predictions (confident learning).

    Arguments and result as `cleanlab.segmentation.filter.find_label_issues`. The predictions must come from models that
    were not trained on these labels, for example by cross-validation.

    Args:
        labels: (N, H, W) class ids from 0 to K - 1; 255 marks ignored pixels.
        pred_probs: (N, K, H, W) probabilities that sum to 1 over K.
        thresholds: (K,) lowest probability of a confident prediction, by class. Default: the mean probability of each
            class over the pixels labeled with it (0.5 for a class without pixels).

    Returns:
        (N, H, W): True where the most probable class reaches its threshold and is not the label.

    Raises:
        ValueError: shapes that do not fit together, or class ids without a probability.

    >>> foreground = np.array([[[0.1, 0.9, 0.8, 0.6]]])
    >>> find_label_issues(np.array([[[0, 0, 1, 1]]]), np.stack([1 - foreground, foreground], axis=1))
    array([[[False,  True, False, False]]])
    """
    labels, pred_probs = np.asarray(labels), np.asarray(pred_probs)
    if labels.ndim != 3 or pred_probs.ndim != 4 or labels.shape != (len(pred_probs), *pred_probs.shape[2:]):
        raise ValueError(
            f"expected labels (N, H, W) and pred_probs (N, K, H, W), got {labels.shape} and {pred_probs.shape}"
        )
    num_classes = pred_probs.shape[1]
    foreign = np.setdiff1d(labels, [*range(num_classes), IGNORE_INDEX])
    if len(foreign):
        raise ValueError(f"labels: expected class ids below {num_classes} or {IGNORE_INDEX}, got {foreign[0]}")
    if thresholds is None:
        thresholds = confident_thresholds(zip(pred_probs, labels, strict=True), num_classes)
    limits = np.asarray(thresholds, float)
    if limits.shape != (num_classes,):
        raise ValueError(f"thresholds: expected {num_classes} values, got shape {limits.shape}")
    confident = np.array([confident_classes(probs, limits) for probs in pred_probs], int).reshape(labels.shape)
    return (labels != IGNORE_INDEX) & (confident >= 0) & (confident != labels)
