"""Crops around prompts, as the network takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kmine.segmenters.base import (
    Embedding,
    check_prompts,
    needs_box,
)
from kmine.segmenters.tiny.crop import Window, window_of
from kmine.segmenters.tiny.network import (
    HINT_LIMIT,
    Asked,
)
from kmine.types import Prompts

if TYPE_CHECKING:
    pass

NO_POINT = -1
"""Label of the padding where prompts of one batch have different numbers of points."""


@dataclass(frozen=True)
class Row:
    """One line of a batch: a prompt's own box, or one of its jittered boxes, with the same points and hint."""

    embedding: Embedding
    """With its image."""
    prompts: Prompts
    """Checked and clipped."""
    box: NDArray[np.float32]
    """(4,) XYXY in the image's frame."""
    jittered: bool
    window: Window


def rows_of(embedding: Embedding, prompts: Prompts, *, side: int, name: str) -> Iterator[Row]:
    """The rows of one `Prompts`: its own box first, then its jittered boxes in order.

    Args:
        embedding: of the prompts' image, with the image.
        prompts: as they were asked, not yet checked.
        side: S, pixels of the crop.
        name: of the segmenter, for errors.

    Raises:
        UserError: prompts without a box.
        ValueError: an embedding without an image, or prompts that do not fit their image.
    """
    if embedding.image is None:
        raise ValueError(f"embedding: expected one of {name}, which keeps the image; encode the image again")
    checked = check_prompts(prompts, embedding.size)
    if checked.box is None:
        raise needs_box(name)
    for number, box in enumerate([checked.box, *checked.jittered_boxes]):
        yield Row(embedding, checked, box, number > 0, window_of(box, side))


def asked_of(rows: Sequence[Row], device: torch.device | str) -> Asked:
    """Crops and prompts of a batch of at least one row as tensors of the crop's frame: what the network is shown."""

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    most = max(_num_points(row.prompts) for row in rows)
    points = np.zeros((len(rows), most, 2), np.float32)
    labels = np.full((len(rows), most), NO_POINT, np.int64)
    for index, row in enumerate(rows):
        if row.prompts.point_coords is not None:
            count = _num_points(row.prompts)
            points[index, :count] = row.window.to_crop(row.prompts.point_coords)
            labels[index, :count] = row.prompts.point_labels
    crops = np.stack([row.window.take(row.embedding.image) for row in rows])
    has_hint = np.array([row.prompts.mask_input is not None for row in rows], np.float32)
    return Asked(
        image=tensor(crops).permute(0, 3, 1, 2).float(),
        limits=tensor(np.stack([row.window.limits(row.embedding.size) for row in rows])),
        boxes=tensor(np.stack([row.window.to_crop(row.box.reshape(2, 2)).ravel() for row in rows])),
        points=tensor(points),
        point_labels=tensor(labels),
        hint=tensor(np.stack([_hint(row) for row in rows]))[:, None],
        has_hint=tensor(has_hint),
    )


def inside_of(row: Row) -> NDArray[np.bool_]:
    """(S, S): which pixels of the crop show the image, and not what is repeated beyond its border."""
    x0, y0, x1, y1 = row.window.limits(row.embedding.size)
    at = np.arange(row.window.side)
    return ((at >= y0) & (at <= y1))[:, None] & ((at >= x0) & (at <= x1))


def _num_points(prompts: Prompts) -> int:
    return 0 if prompts.point_coords is None else len(prompts.point_coords)


def _hint(row: Row) -> NDArray[np.float32]:
    """(S, S) logits; beyond the image surely background, as in training; zeros without a hint."""
    side, hint = row.window.side, row.prompts.mask_input
    if hint is None:
        return np.zeros((side, side), np.float32)
    crop = row.window.take(np.clip(hint, -HINT_LIMIT, HINT_LIMIT, dtype=np.float32))
    return np.where(inside_of(row), crop, np.float32(-HINT_LIMIT))
