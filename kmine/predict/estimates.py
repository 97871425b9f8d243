"""Estimated Dice of predictions, by the run's calibration of the local model's own masks.

Letters: K classes, S the side of the square.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.data.resize import to_frame
from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.ops import masks
from kmine.predict.metadata import ModelMetadata
from kmine.types import Probs

OBJECT_COLUMNS = ("file", "slice", "class", "px", "x0", "y0", "x1", "y1", "estimated_dice")
"""Of objects.csv."""


class ObjectEstimate(NamedTuple):
    """One object of one image or slice."""

    class_id: int
    area: int
    """Pixels."""
    box: tuple[int, int, int, int]
    """XYXY, ends inclusive."""
    estimate: float
    """Of its Dice, in [0, 1]."""


def estimator_of_run(root: Path) -> tuple[Mapping[str, Any] | None, str]:
    """What calibration.json has under `alone`, and where it has nothing, why."""
    path = root / "calibration" / "calibration.json"
    try:
        saved = json.loads(path.read_text("utf-8"))
    except OSError:
        return None, "the run has no calibrated gate, so no Dice can be estimated"
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        return None, f"{path.name} is damaged, so no Dice can be estimated; the loop's command makes it anew"
    if "alone" not in saved:
        return None, "the run is older than estimates without a segmenter; the loop's command, once more, adds them"
    if not saved["alone"]:
        return None, "too few labeled objects were found to learn an estimate of Dice from"
    return saved["alone"], ""


def load_estimator(metadata: ModelMetadata, tta: str) -> tuple[LocalQualityEstimator | None, str]:
    """What estimates Dice of predictions made with `tta`, and where nothing does, why.

    Flips change how sure a model seems, so what was learnt with other flips is not used.
    """
    if metadata.alone is None:
        return None, metadata.no_estimate or "this model was exported without what estimates Dice; export the run again"
    estimator = LocalQualityEstimator.from_json(metadata.alone)
    if tta not in estimator.calibrators:
        return None, f"Dice can be estimated with --tta {' or '.join(estimator.calibrators)}, not with {tta}"
    return estimator, ""


def estimate_objects(
    estimator: LocalQualityEstimator,
    tta: str,
    probs: NDArray[np.float32],
    std: NDArray[np.float32] | None,
    mask: NDArray[np.uint8],
) -> list[ObjectEstimate]:
    """The objects of an image or slice, by class, largest first; those too small for prompts are left out.

    Args:
        estimator: as `load_estimator` gives it for `tta`.
        tta: how it was predicted.
        probs: (K, S, S).
        std: (1, S, S), deviation of the foreground's over flips; None without flips.
        mask: (H, W), what is written: without an object nothing else is looked at.
    """
    if not mask.any():
        return []
    native_probs = Probs("", to_frame(probs, *mask.shape), None if std is None else to_frame(std, *mask.shape)[0])
    return [
        ObjectEstimate(
            prompt.class_id, int(np.count_nonzero(component)), tuple(map(int, masks.tight_box(component))), estimate
        )
        for prompt, estimate in estimator.estimates(native_probs, tta)
        if (component := prompt.component) is not None
    ]


def image_estimate(objects: Sequence[ObjectEstimate]) -> float | None:
    """Mean of the estimates by area, of all objects of an image or volume; None without any."""
    if not objects:
        return None
    return float(np.average([obj.estimate for obj in objects], weights=[obj.area for obj in objects]))


def object_rows(
    objects: Sequence[tuple[int | str, ObjectEstimate]], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of objects.csv, but for the name of the file; objects come with the number of their slice."""
    return [
        {
            "slice": number,
            "class": class_names[obj.class_id],
            "px": obj.area,
            **dict(zip(("x0", "y0", "x1", "y1"), obj.box, strict=True)),
            "estimated_dice": round(obj.estimate, 4),
        }
        for number, obj in objects
    ]
