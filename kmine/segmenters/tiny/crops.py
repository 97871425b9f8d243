"""Prompts to the network's input: crops of S x S pixels around boxes, for inference and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kmine.segmenters.base import MASK_INPUT_CLIP, Embedding, box_required_error, check_prompts
from kmine.segmenters.tiny.network import NetworkInput
from kmine.segmenters.tiny.window import Window, window_of
from kmine.types import Prompts

NO_POINT = -1
"""Label of padding where prompts of a batch differ in their number of points."""


@dataclass(frozen=True)
class CropQuery:
    """One row of a batch: a prompt's box or one of its jittered boxes, with its points and mask input."""

    embedding: Embedding
    """With its image."""
    prompts: Prompts
    """Checked and clipped."""
    box: NDArray[np.float32]
    """(4,) XYXY in the image's frame."""
    jittered: bool
    window: Window


def crop_queries(embedding: Embedding, prompts: Prompts, *, side: int, name: str) -> Iterator[CropQuery]:
    """Rows of one `Prompts`: its box, then its jittered boxes in order; `side` is S, `name` the segmenter's.

    Raises `UserError` without a box, `ValueError` without the image or for prompts that do not fit it.
    """
    if embedding.image is None:
        raise ValueError(f"embedding: expected one of {name} with the image, got none; encode the image again")
    checked = check_prompts(prompts, embedding.size)
    if checked.box is None:
        raise box_required_error(name)
    for number, box in enumerate([checked.box, *checked.jittered_boxes]):
        yield CropQuery(embedding, checked, box, number > 0, window_of(box, side))


def network_input(queries: Sequence[CropQuery], device: torch.device | str) -> NetworkInput:
    """Crops and prompts of at least one row, as tensors in the crop's frame."""

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    most = max(_num_points(query.prompts) for query in queries)
    points = np.zeros((len(queries), most, 2), np.float32)
    labels = np.full((len(queries), most), NO_POINT, np.int64)
    for index, query in enumerate(queries):
        if query.prompts.point_coords is not None:
            count = _num_points(query.prompts)
            points[index, :count] = query.window.to_crop(query.prompts.point_coords)
            labels[index, :count] = query.prompts.point_labels
    crops = np.stack([query.window.crop(query.embedding.image) for query in queries])
    has_mask_input = np.array([query.prompts.mask_input is not None for query in queries], np.float32)
    return NetworkInput(
        image=tensor(crops).permute(0, 3, 1, 2).float(),
        limits=tensor(np.stack([query.window.limits(query.embedding.size) for query in queries])),
        boxes=tensor(np.stack([query.window.to_crop(query.box.reshape(2, 2)).ravel() for query in queries])),
        points=tensor(points),
        point_labels=tensor(labels),
        mask_input=tensor(np.stack([_mask_input(query) for query in queries]))[:, None],
        has_mask_input=tensor(has_mask_input),
    )


def valid_region(query: CropQuery) -> NDArray[np.bool_]:
    """(S, S): pixels of the crop inside the image."""
    x0, y0, x1, y1 = query.window.limits(query.embedding.size)
    at = np.arange(query.window.side)
    return ((at >= y0) & (at <= y1))[:, None] & ((at >= x0) & (at <= x1))


def _num_points(prompts: Prompts) -> int:
    return 0 if prompts.point_coords is None else len(prompts.point_coords)


def _mask_input(query: CropQuery) -> NDArray[np.float32]:
    """(S, S) logits; certain background beyond the image, as in training; zeros without a mask input."""
    side, mask_input = query.window.side, query.prompts.mask_input
    if mask_input is None:
        return np.zeros((side, side), np.float32)
    crop = query.window.crop(np.clip(mask_input, -MASK_INPUT_CLIP, MASK_INPUT_CLIP, dtype=np.float32))
    return np.where(valid_region(query), crop, np.float32(-MASK_INPUT_CLIP))
