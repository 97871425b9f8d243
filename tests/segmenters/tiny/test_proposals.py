"""The grid of boxes by hand, and the suppression of near-duplicates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.segmenter_suite import ProposalSuite, disc

from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny import SHIPPED
from kmine.segmenters.tiny.proposals import grid_boxes, propose
from kmine.segmenters.tiny.segmenter import open_tiny
from kmine.types import Candidate


class TestProposals(ProposalSuite):
    @pytest.fixture
    def segmenter(self):
        return open_tiny(SHIPPED)


def test_the_grid_by_hand() -> None:
    boxes = grid_boxes((100, 100))
    sides = boxes[:, 2] - boxes[:, 0]
    # Side 20 in steps of 10: 9 x 9; 28: 72 / 14 = 5.1, so 7 x 7; 40: 60 / 20, 4 x 4; 55: 45 / 27.5, 3 x 3; then 2 x 2.
    assert [int((np.abs(sides - side) < 0.01).sum()) for side in (20, 28, 40, 55, 75, 95)] == [81, 49, 16, 9, 4, 4]
    assert boxes[0].tolist() == [0, 0, 20, 20] and boxes[1].tolist() == [10, 0, 30, 20]
    assert boxes[-1].tolist() == [5, 5, 100, 100]


@pytest.mark.parametrize("size", [(500, 600), (1, 1), (3, 2), (40, 1000), (1000, 40), (33, 33)])
def test_the_grid_covers_any_image_with_a_bounded_number_of_boxes(size) -> None:
    boxes = grid_boxes(size)
    assert 0 < len(boxes) <= 260
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= np.array(size[::-1]) + 1e-3).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    first = boxes[np.abs(boxes - boxes[0])[:, [1, 3]].max(axis=1) < 1e-3]  # the top row of the smallest scale
    first = first[np.abs((first[:, 2] - first[:, 0]) - (boxes[0, 2] - boxes[0, 0])) < 1e-3]
    assert first[-1, 2] == pytest.approx(size[1])
    assert (np.diff(first[:, 0]) <= (first[0, 2] - first[0, 0]) / 2 + 1e-3).all()


class Fixed(Ellipse):
    """Gives masks and scores for the first boxes, empty masks for all others."""

    def __init__(self, *outputs) -> None:
        self.outputs = outputs

    def decode(self, embeddings, prompts):
        (ellipses,) = super().decode(embeddings, prompts)
        out = [
            replace(mask, masks=np.zeros_like(mask.masks), predicted_iou=np.ones(1, np.float32)) for mask in ellipses
        ]
        for n, (mask, score) in enumerate(self.outputs):
            out[n] = Candidate(mask[None], np.full(1, score, np.float32), np.ones(1, np.float32), None, mask[None][:0])
        return [out]


def test_the_best_of_near_duplicates_remains_and_empty_masks_are_removed() -> None:
    def box(left: int, width: int) -> np.ndarray:
        mask = np.zeros((40, 60), bool)
        mask[10:20, left : left + width] = True
        return mask

    # 10 x 20 against 10 x 18 inside it: box IoU 0.9; against the same one moved by 8: 12 / 28.
    segmenter = Fixed((box(5, 20), 0.6), (box(5, 18), 0.8), (box(13, 20), 0.4))
    (embedding,) = segmenter.encode([np.zeros((40, 60, 3), np.uint8)])
    proposals = propose(segmenter, embedding)
    assert proposals.predicted_iou.tolist() == pytest.approx([0.8, 0.4])
    assert (proposals.masks[0] == box(5, 18)).all() and (proposals.masks[1] == box(13, 20)).all()
    assert len(propose(Fixed(), embedding).masks) == 0


def test_a_disc_is_found_without_a_prompt() -> None:
    truth = disc((120, 150), 70, 48, 22)
    rng = np.random.default_rng(0)
    image = np.where(truth[..., None], (170, 90, 80), (90, 50, 40)) + rng.normal(0, 6, (120, 150, 3))
    segmenter = open_tiny(SHIPPED)
    (proposals,) = segmenter.propose(segmenter.encode([image.clip(0, 255).astype(np.uint8)]))
    ious = [(mask & truth).sum() / (mask | truth).sum() for mask in proposals.masks]
    assert max(ious) > 0.8
