"""Automatic masks of an image from box prompts: a grid of boxes and non-maximum suppression."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

from kmine.ops import masks
from kmine.segmenters.base import Embedding, Proposals, Segmenter, proposals_of
from kmine.types import Candidate, Prompts

SCALES = (0.2, 0.28, 0.4, 0.55, 0.75, 0.95)
"""Sides of the boxes as shares of the image's shorter side; neighbours overlap by half."""
MAX_ASPECT = 2.0
"""In a longer image the boxes grow with its length, otherwise a strip would take thousands of boxes."""
MAX_BOX_IOU = 0.7
"""Of two masks whose tight boxes overlap more, the one with the higher predicted IoU remains, as in SAM's generator."""


def propose(segmenter: Segmenter, embedding: Embedding) -> Proposals:
    """Masks of the grid's boxes from a segmenter that predicts IoU, without empty masks and near-duplicates."""
    prompts = [Prompts(class_id=1, box=box) for box in grid_boxes(embedding.size)]
    (candidates,) = segmenter.decode([embedding], [prompts])
    candidates = [candidate for candidate in candidates if candidate.masks[candidate.best].any()]
    kept = [candidates[n] for n in _non_duplicates(candidates)]
    return proposals_of(
        embedding.size,
        [candidate.masks[candidate.best] for candidate in kept],
        [candidate.predicted_iou[candidate.best] for candidate in kept],
        [candidate.stability_score[candidate.best] for candidate in kept],
    )


def grid_boxes(size: tuple[int, int]) -> NDArray[np.float32]:
    """(B, 4) XYXY over an image of `size` = (H, W) in steps of at most half a box, small ones first, row by row."""
    height, width = size
    base = max(min(size), max(size) / MAX_ASPECT)
    boxes = []
    for scale in SCALES:
        across, down = (min(max(scale * base, 1.0), length) for length in (width, height))
        boxes += [(x, y, x + across, y + down) for y, x in product(_starts(height, down), _starts(width, across))]
    return np.array(boxes, np.float32)


def _starts(length: int, side: float) -> NDArray[np.float64]:
    return np.linspace(0, length - side, math.ceil(2 * (length - side) / side - 1e-9) + 1)


def _non_duplicates(candidates: list[Candidate]) -> list[int]:
    """Indices of the candidates that remain, in decreasing order of predicted IoU."""
    if not candidates:
        return []
    boxes = np.stack([masks.tight_box(candidate.masks[candidate.best]) for candidate in candidates])
    boxes[:, 2:] += 1  # inclusive ends: a mask of one pixel has an area
    scores = np.array([candidate.predicted_iou[candidate.best] for candidate in candidates], np.float32)
    return nms(torch.from_numpy(boxes), torch.from_numpy(scores), MAX_BOX_IOU).tolist()
