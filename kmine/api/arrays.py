"""Arrays in memory as a data set."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.config import DataConfig
from kmine.errors import UserError
from kmine.io.files import read_json, sign, write_atomic, write_csv, write_json
from kmine.types import IGNORE_INDEX

RECORD = "arrays.json"


class ArrayDataset:
    """Images and masks in memory; a mask that is None makes its image an unlabeled one.

    Args:
        images: (H, W, 3) RGB or (H, W) grey, uint8, [0, 255]; sizes may differ.
        masks: one entry an image: (H, W) integer class ids, or None. With more than two classes 255 is ignored.
        class_names: names by class id; 0 is the background.
        groups: patient or volume of each image; images of one group stay on one side of a split.
        image_labels: image-level diagnosis of each image: 0 free of the last class (the lesion), 1 with it, None
            unknown.

    Raises:
        UserError: lists of different lengths, or an array of another shape, type or range; names the index.

    Example:
        >>> import numpy as np
        >>> image, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=int)
        >>> len(ArrayDataset([image, image], [mask, None]))
        2
    """

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]],
        masks: Sequence[NDArray[np.integer[Any]] | None],
        *,
        class_names: Sequence[str] = ("background", "object"),
        groups: Sequence[str] | None = None,
        image_labels: Sequence[int | None] | None = None,
    ) -> None:
        for name, values in (("masks", masks), ("groups", groups), ("image_labels", image_labels)):
            if values is not None and len(values) != len(images):
                raise UserError(f"{name}: expected one entry for each of {len(images)} images, got {len(values)}")
        self.class_names = tuple(class_names)
        cure = "; scale it to [0, 255] and convert it with .astype(numpy.uint8)"
        self.images = [rgb_image(image, f"images[{n}]", cure) for n, image in enumerate(images)]
        self.masks = [
            None if mask is None else _class_ids(mask, image.shape[:2], len(self.class_names), f"masks[{n}]")
            for n, (image, mask) in enumerate(zip(self.images, masks, strict=True))
        ]
        self.groups = None if groups is None else list(map(str, groups))
        self.image_labels = None if image_labels is None else [_label(x, n) for n, x in enumerate(image_labels)]

    def __len__(self) -> int:
        return len(self.images)

    def write(self, folder: Path, cfg: DataConfig) -> DataConfig:
        """Write the arrays below `folder` as lossless PNG files; returns `cfg` with the settings that read them.

        Later commands (`kmine audit`, a resumed `fit`) read the same files. Equal arrays are not written again.

        Raises:
            UserError: `folder` holds other arrays, or cannot be written.
        """
        signature = sign(self.class_names, self.groups, self.image_labels, *map(_content, (*self.images, *self.masks)))
        table = folder / "samples.csv"
        previous = read_json(folder / RECORD)
        if previous is not None and previous.get("signature") != signature:
            raise UserError(f"{folder}: holds the arrays of another data set; choose another out")
        if previous is None:
            self._write_files(folder, table)
            write_json(folder / RECORD, {"signature": signature})
        return replace(cfg, name="folder", csv=str(table), class_names=self.class_names)

    def _write_files(self, folder: Path, table: Path) -> None:
        rows = []
        for n, (image, mask) in enumerate(zip(self.images, self.masks, strict=True)):
            names = f"{n:06d}.png", f"masks/{n:06d}.png" if mask is not None else ""
            write_atomic(folder / names[0], _png(image))
            if mask is not None:  # a mask of two classes is stored as black and white
                write_atomic(folder / names[1], _png(mask * np.uint8(255) if len(self.class_names) == 2 else mask))
            label = None if self.image_labels is None else self.image_labels[n]
            rows.append((*names, self.groups[n] if self.groups else "", "" if label is None else label))
        write_csv(table, ("image", "mask", "group", "label"), rows)


def _label(label: int | None, index: int) -> int | None:
    """An image-level label as a plain int, so that equal labels of NumPy and of a list have one signature."""
    if label is not None and label not in (0, 1):
        raise UserError(f"image_labels[{index}]: expected 0, 1 or None (unknown), got {label}")
    return None if label is None else int(label)


def _content(array: NDArray[np.uint8] | None) -> str:
    return "" if array is None else f"{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _png(array: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def rgb_image(image: NDArray[np.uint8], name: str, cure: str = "") -> NDArray[np.uint8]:
    """(H, W, 3) or (H, W) uint8 -> (H, W, 3). Raises `UserError` with `name` and `cure` for another shape or type."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        expected = "expected (H, W, 3) RGB or (H, W) grey of uint8 in [0, 255]"
        raise UserError(f"{name}: {expected}, got {array.shape} of {array.dtype}{cure}")
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def _class_ids(mask: NDArray[Any], shape: tuple[int, ...], num_classes: int, name: str) -> NDArray[np.uint8]:
    array = np.asarray(mask)
    if array.shape != shape or array.dtype.kind not in "biu":
        raise UserError(f"{name}: expected {shape} of integers or bool, got {array.shape} of {array.dtype}")
    values = np.unique(array)
    strange = values[(values >= num_classes) & ((values != IGNORE_INDEX) | (num_classes == 2)) | (values < 0)]
    if len(strange):
        also = "" if num_classes == 2 else f" and {IGNORE_INDEX} (ignored)"
        raise UserError(
            f"{name}: expected class ids 0 to {num_classes - 1}{also}, got {strange[0]}; class_names lists them"
        )
    return np.ascontiguousarray(array, np.uint8)
