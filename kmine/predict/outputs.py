"""Write the outputs of an image or volume: mask, probabilities, overlay; and make its row of the table.

Letters: K classes, S the side of the square, D slices, H and W of the native frame.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.io.dicom_seg import encode_seg
from kmine.data.io.nifti_write import encode_mask
from kmine.data.resize import to_frame
from kmine.io.files import atomic_open, encode_png
from kmine.predict.estimates import ObjectEstimate, object_rows
from kmine.predict.inputs import Input
from kmine.predict.log import Row
from kmine.predict.reader import Loaded
from kmine.report.panels import draw_mask, encode_picture
from kmine.types import most_probable

LONG_SIDE = 1024
"""Longest side of an overlay in pixels; larger ones take longer than the prediction."""


@dataclass(frozen=True)
class Prediction:
    """Prediction of an image or a volume."""

    mask: NDArray[np.uint8]
    """(H, W), or (D, H, W) of a volume: class ids."""
    mean_max_probability: float
    """Mean over all pixels, at training size, of the highest probability."""
    warning: str
    """Difference of the image from the training images; empty if there is none."""
    objects: Sequence[tuple[int, ObjectEstimate]] | None = None
    """Objects with their slice number (0 for an image); None without an estimator of Dice."""
    probs: NDArray[np.float32] | None = None
    """(K, H, W), sums to 1 over K; only of images, and only if requested."""

    @property
    def estimated_dice(self) -> float | None:
        """Mean of the objects' estimates by area; None without an object or an estimator."""
        objects = [obj for _, obj in self.objects or ()]
        return float(np.average([o.estimate for o in objects], weights=[o.area for o in objects])) if objects else None


def class_mask(probs: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """(K, S, S) -> (height, width) class ids: the most probable class of the resized (bilinear) probabilities."""
    if len(probs) == 2:
        # Resizing is linear, so the difference of the two classes can be resized instead.
        return (to_frame(probs[1:] - probs[:1], height, width)[0] > 0).astype(np.uint8)
    return most_probable(to_frame(probs, height, width))


def mean_max_probability(probs: NDArray[np.float32]) -> float:
    """(K, S, S) -> highest probability, averaged over the pixels."""
    return float(reduce(np.maximum, probs).mean())


def write_outputs(loaded: Loaded, prediction: Prediction, out: Path, names: Mapping[str, str]) -> None:
    """Write the outputs in `names`, but not the probabilities of a volume, which are in its `ProbabilityFile`.

    The overlay of a volume shows the slice with the largest mask.
    """
    mask = prediction.mask
    data = encode_png(mask, palette=True) if loaded.frame is None else encode_mask(mask, loaded.frame)
    _write(out / names["mask"], data)
    if "probs" in names and loaded.frame is None:
        assert prediction.probs is not None, "requested"
        buffer = io.BytesIO()
        np.savez_compressed(buffer, probabilities=prediction.probs.astype(np.float16))
        _write(out / names["probs"], buffer.getvalue())
    if "overlay" in names:
        assert loaded.native is not None, "kept for the overlay"
        masks = mask if mask.ndim == 3 else mask[None]
        areas = np.array([np.count_nonzero(slice_mask) for slice_mask in masks])
        number = int(areas.argmax()) if areas.any() else len(areas) // 2
        _write(out / names["overlay"], overlay(loaded.native[number], masks[number]))


def write_seg(item: Input, loaded: Loaded, mask: NDArray[np.uint8], path: Path, class_names: Sequence[str]) -> None:
    """Write an (H, W) or (D, H, W) mask as DICOM segmentation. `SampleError` where none can refer to the image."""
    series, stack = loaded.series, mask if item.is_volume else mask[None]
    if series and series.frames:
        stack = stack[np.argsort(series.frames)]
    _write(path, encode_seg(series.files if series else item.files, stack, class_names))


def prediction_columns(class_names: Sequence[str]) -> list[str]:
    """Columns of predictions.csv."""
    per_class = [f"{name}_{what}" for name in class_names[1:] for what in ("px", "mm2", "mm3", "components")]
    first = ["file", "mask", "kind", "width", "height", "slices", *per_class]
    return [*first, "num_objects", "estimated_dice", "mean_max_probability", "warning", "error"]


def prediction_row(
    item: Input, loaded: Loaded, prediction: Prediction, class_names: Sequence[str], names: Mapping[str, str]
) -> Row:
    """Row of predictions.csv: pixels (voxels) of each class, mm2 or mm3 if the spacing is known.

    The estimated Dice is the mean over the objects by area; it is empty without objects, since missed ones have no
    estimate. `objects` has the rows of objects.csv.
    """
    dice = prediction.estimated_dice
    row: Row = {
        "file": str(item.path),
        "mask": names["mask"],
        "kind": item.kind,
        "width": loaded.shape[1],
        "height": loaded.shape[0],
        "slices": len(prediction.mask) if item.is_volume else "",
        "num_objects": "" if prediction.objects is None else len(prediction.objects),
        "estimated_dice": "" if dice is None else round(dice, 4),
        "mean_max_probability": round(prediction.mean_max_probability, 4),
        "warning": prediction.warning,
        "error": "",
        "objects": object_rows([(_slice_number(loaded, n), obj) for n, obj in prediction.objects or ()], class_names),
    }
    area = loaded.spacing[0] * loaded.spacing[1] if loaded.spacing else None
    depth = loaded.frame.thickness if loaded.frame else None
    for class_id, name in enumerate(class_names[1:], 1):
        region = prediction.mask == class_id
        count = int(np.count_nonzero(region))
        row[f"{name}_px"] = count
        row[f"{name}_mm2"] = round(count * area, 3) if area and not item.is_volume else ""
        row[f"{name}_mm3"] = round(count * area * depth, 3) if area and depth else ""
        row[f"{name}_components"] = num_components(region) if count else 0
    return row


def _slice_number(loaded: Loaded, number: int) -> int | str:
    """Index of a slice in the order of the file; empty for an image."""
    if loaded.frame is None:
        return ""
    backwards = dict(loaded.frame.orientation)[2] == -1
    return len(loaded.small) - 1 - number if backwards else number


def num_components(mask: NDArray[np.bool_]) -> int:
    """Number of connected components of an (H, W) or (D, H, W) mask; corners connect."""
    if mask.ndim == 2:
        return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
    from scipy import ndimage

    return int(ndimage.label(mask, np.ones((3, 3, 3)))[1])


def overlay(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> bytes:
    """JPEG bytes: an (H, W) or (H, W, 3) image with its mask drawn over it, reduced to `LONG_SIDE`."""
    picture = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()
    share = LONG_SIDE / max(picture.shape[:2])
    if share < 1:
        side = (max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share)))
        picture = cv2.resize(picture, side, interpolation=cv2.INTER_AREA)
    return encode_picture(draw_mask(picture, mask), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 90])


def _write(path: Path, data: bytes) -> None:
    """Write atomically, but without fsync, which takes longer than the prediction.

    A file damaged by a power cut has another size than `OutputLog` recorded and is written again.
    """
    with atomic_open(path, sync=False) as file:
        file.write(data)
