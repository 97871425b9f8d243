"""Estimated Dice of predictions, by the run's calibration of masks without a segmenter.

Letters: K classes, S the side of the square, H and W of the native frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.data.resize import to_frame
from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.ops import masks
from kmine.predict.metadata import ModelMetadata
from kmine.store.artifacts import DamagedError, read_checked
from kmine.types import Probs

OBJECT_COLUMNS = ("file", "slice", "class", "px", "x0", "y0", "x1", "y1", "estimated_dice")
"""Columns of objects.csv."""


class ObjectEstimate(NamedTuple):
    """One object of one image or slice."""

    class_id: int
    area: int
    """Pixels."""
    box: tuple[int, int, int, int]
    """XYXY pixels, ends inclusive."""
    estimate: float
    """Estimated Dice in [0, 1]."""


def local_quality_of_run(root: Path) -> tuple[Mapping[str, Any] | None, str]:
    """`alone` of calibration.json, and the reason if there is none."""
    path = root / "calibration" / "calibration.json"
    if not path.is_file():
        return None, "the run has no calibrated gate, so no Dice can be estimated"
    try:
        saved = read_checked(path) or {}
    except DamagedError:
        return None, f"{path.name} is damaged, so no Dice can be estimated; run the loop's command again to restore it"
    if "alone" not in saved:
        return None, "the run is older than estimates without a segmenter; run the loop's command again to add them"
    if not saved["alone"]:
        return None, "too few labeled objects were found to fit an estimator of Dice"
    return saved["alone"], ""


def load_estimator(metadata: ModelMetadata, tta: str) -> tuple[LocalQualityEstimator | None, str]:
    """The estimator of Dice for predictions with `tta`, and the reason if there is none.

    Flips change the confidence of a model, so an estimator fitted with other flips is not used.
    """
    if metadata.local_quality is None:
        missing = "this model was exported without an estimator of Dice; export the run again"
        return None, metadata.no_estimate or missing
    estimator = LocalQualityEstimator.from_json(metadata.local_quality)
    if tta not in estimator.calibrators:
        return None, f"Dice can be estimated with --tta {' or '.join(estimator.calibrators)}, not with {tta}"
    return estimator, ""


def estimate_objects(
    estimator: LocalQualityEstimator | None,
    tta: str,
    probs: NDArray[np.float32],
    std: NDArray[np.float32] | None,
    mask: NDArray[np.uint8],
) -> list[ObjectEstimate] | None:
    """The objects of an image or slice, by class, largest first; those too small for prompts are excluded.

    Args:
        estimator: from `load_estimator` with the same `tta`; without one the result is None.
        tta: test-time augmentation of the prediction.
        probs: (K, S, S).
        std: (1, S, S) standard deviation of the foreground probability over flips; None without flips.
        mask: (H, W) predicted class ids.
    """
    if estimator is None or not mask.any():
        return None if estimator is None else []
    native_probs = Probs("", to_frame(probs, *mask.shape), None if std is None else to_frame(std, *mask.shape)[0])
    return [
        ObjectEstimate(
            prompt.class_id, int(np.count_nonzero(component)), tuple(map(int, masks.tight_box(component))), estimate
        )
        for prompt, estimate in estimator.estimates(native_probs, tta)
        if (component := prompt.component) is not None
    ]


def object_rows(
    objects: Sequence[tuple[int | str, ObjectEstimate]], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of objects.csv without the column `file`, from pairs of slice number and object."""
    rows = ((number, class_names[obj.class_id], obj.area, *obj.box, round(obj.estimate, 4)) for number, obj in objects)
    return [dict(zip(OBJECT_COLUMNS[1:], row, strict=True)) for row in rows]
