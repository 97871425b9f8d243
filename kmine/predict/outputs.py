"""From probabilities to what is written of an image: mask, probabilities, overlay, and a row of the table.

Letters: K classes, S the side of the square, D slices, H and W of the native frame.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.io.nifti_write import encode_mask
from kmine.data.resize import to_frame
from kmine.io.errors import user_errors
from kmine.io.files import UNFINISHED
from kmine.predict.estimates import ObjectEstimate, image_estimate, object_rows
from kmine.predict.inputs import Input
from kmine.predict.metadata import ModelMetadata, colours
from kmine.predict.reader import Loaded

FILL = 0.35
"""How much of an overlay's colour lies on the image inside of a mask; its border is drawn in full."""
LONG_SIDE = 1024
"""Of an overlay: more cannot be seen, and takes longer than predicting."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """Prediction of an image or a volume."""

    mask: NDArray[np.uint8]
    """(H, W), or (D, H, W) of a volume: class ids."""
    mean_max_probability: float
    """Mean over all pixels, at the size of training, of the highest probability."""
    warning: str
    """Why the image differs from the training images; empty where it does not."""
    objects: Sequence[tuple[int, ObjectEstimate]] | None = None
    """Each with its slice number (0 for an image); None where the model holds no estimator of Dice."""
    probs: NDArray[np.float32] | None = None
    """(K, H, W), sums to 1 over K; kept where requested, of images only."""

    @property
    def estimated_dice(self) -> float | None:
        """Mean of the objects' estimates by area; None without an object or an estimator."""
        return image_estimate([obj for _, obj in self.objects or ()])


def class_mask(probs: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """(K, S, S) -> (height, width): the most probable class, after probabilities were resized (bilinear)."""
    if len(probs) == 2:
        # One plane says the same: resizing is linear.
        return (to_frame(probs[1:] - probs[:1], height, width)[0] > 0).astype(np.uint8)
    return to_frame(probs, height, width).argmax(axis=0).astype(np.uint8)


def mean_max_probability(probs: NDArray[np.float32]) -> float:
    """(K, S, S) -> mean over the pixels of the highest probability."""
    return float(reduce(np.maximum, probs).mean())


def output_names(item: Input, probs: bool, overlay: bool) -> dict[str, str]:
    """Kind of output -> its path below the folder of outputs."""
    names = {"mask": f"masks/{item.name}{'.nii.gz' if item.is_volume else '.png'}"}
    if probs:
        names["probs"] = f"probs/{item.name}{'.nii' if item.is_volume else '.npz'}"
    if overlay:
        names["overlay"] = f"overlays/{item.name}.jpg"
    return names


def write_image_outputs(
    item: Input,
    loaded: Loaded,
    prediction: Prediction,
    probs: NDArray[np.float32],
    metadata: ModelMetadata,
    out: Path,
    names: Mapping[str, str],
) -> Row:
    """Write what is wanted of an image; its row. `probs` is (K, S, S)."""
    _write(out / names["mask"], _png(prediction.mask))
    if "probs" in names:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, probabilities=to_frame(probs, *loaded.shape).astype(np.float16))
        _write(out / names["probs"], buffer.getvalue())
    if "overlay" in names:
        assert loaded.native is not None, "kept for the overlay"
        _write(out / names["overlay"], overlay(loaded.native[0], prediction.mask, len(metadata.class_names)))
    return prediction_row(item, loaded, prediction, metadata, names)


def write_volume_outputs(
    item: Input, loaded: Loaded, prediction: Prediction, metadata: ModelMetadata, out: Path, names: Mapping[str, str]
) -> Row:
    """Write the mask of a volume, and of the slice that shows most of it an overlay; its row."""
    assert loaded.frame is not None, "of a volume"
    _write(out / names["mask"], encode_mask(prediction.mask, loaded.frame))
    if "overlay" in names:
        assert loaded.native is not None, "kept for the overlay"
        areas = np.array([np.count_nonzero(slice_mask) for slice_mask in prediction.mask])
        number = int(areas.argmax()) if areas.any() else len(areas) // 2
        drawn = overlay(loaded.native[number], prediction.mask[number], len(metadata.class_names))
        _write(out / names["overlay"], drawn)
    return prediction_row(item, loaded, prediction, metadata, names)


def prediction_columns(class_names: Sequence[str]) -> list[str]:
    """Of predictions.csv."""
    per_class = [f"{name}_{what}" for name in class_names[1:] for what in ("px", "mm2", "mm3", "components")]
    first = ["file", "mask", "kind", "width", "height", "slices", *per_class]
    return [*first, "num_objects", "estimated_dice", "mean_max_probability", "warning", "error"]


def prediction_row(
    item: Input, loaded: Loaded, prediction: Prediction, metadata: ModelMetadata, names: Mapping[str, str]
) -> Row:
    """What predictions.csv says of an image: pixels (voxels) of each class, mm2 or mm3 where the spacing is known.

    Its estimated Dice is the mean over its objects by area, empty where there is none: missed objects are not
    rated. `objects` holds the rows of objects.csv.
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
        "objects": object_rows(
            [(_slice_number(loaded, n), obj) for n, obj in prediction.objects or ()], metadata.class_names
        ),
    }
    area = loaded.spacing[0] * loaded.spacing[1] if loaded.spacing else None
    depth = loaded.frame.thickness if loaded.frame else None
    for class_id, name in enumerate(metadata.class_names[1:], 1):
        region = prediction.mask == class_id
        count = int(np.count_nonzero(region))
        flat, deep = area and not item.is_volume, area and depth
        row[f"{name}_px"] = count
        row[f"{name}_mm2"] = round(count * area, 3) if flat and area else ""
        row[f"{name}_mm3"] = round(count * area * depth, 3) if deep and area and depth else ""
        row[f"{name}_components"] = num_components(region) if count else 0
    return row


def _slice_number(loaded: Loaded, number: int) -> int | str:
    """The number of a slice from 0 as it lies in the file; empty for an image."""
    if loaded.frame is None:
        return ""
    backwards = dict(loaded.frame.orientation)[2] == -1
    return len(loaded.small) - 1 - number if backwards else number


def num_components(mask: NDArray[np.bool_]) -> int:
    """Connected parts of an (H, W) or (D, H, W) mask; corners connect."""
    if mask.ndim == 2:
        return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
    from scipy import ndimage

    return int(ndimage.label(mask, np.ones((3, 3, 3)))[1])


def overlay(image: NDArray[np.uint8], mask: NDArray[np.uint8], num_classes: int) -> bytes:
    """JPEG bytes: an (H, W) or (H, W, 3) image with its mask laid over it, at most `LONG_SIDE` long."""
    picture = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()
    share = LONG_SIDE / max(picture.shape[:2])
    if share < 1:
        side = (max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share)))
        picture = cv2.resize(picture, side, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, side, interpolation=cv2.INTER_NEAREST)
    for class_id, colour in enumerate(colours(num_classes).tolist()):
        region = (mask == class_id).astype(np.uint8)
        if class_id == 0 or not region.any():
            continue
        inside = region.astype(bool)
        picture[inside] = (picture[inside] * (1 - FILL) + np.array(colour) * FILL).astype(np.uint8)
        border = inside & ~cv2.erode(region, np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
        picture[border] = colour
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done, "any 8-bit picture can be a JPEG"
    return data.tobytes()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, as `store.write_atomic`, but without waiting for the disk, which takes longer than all else.

    What a power cut leaves of it has another size than the ledger says, and is made again.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _png(mask: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".png", mask)
    assert done, "any 8-bit picture can be a PNG"
    return data.tobytes()
