"""Frames by hand: where pixels, points and boxes of an image lie in the network's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmine.segmenters.base import MASK_INPUT_CLIP
from kmine.segmenters.frame import SquareFrame

PADDED, SQUASHED = SquareFrame(8), SquareFrame(8, squash=True)


@pytest.mark.parametrize(
    ("frame", "size", "covered"),
    # 8 / 6 = 1.33: 4 rows become 5.33; 3 / 200 of 8 would round to no row at all.
    [(PADDED, (4, 6), (5, 8)), (PADDED, (16, 4), (8, 2)), (PADDED, (3, 200), (1, 8)), (SQUASHED, (4, 6), (8, 8))],
)
def test_the_part_that_an_image_covers(frame, size, covered) -> None:
    assert frame.covered(size) == covered


def test_points_and_boxes_are_scaled_axis_by_axis() -> None:
    # (4, 6) rows and columns cover (5, 8): x times 8 / 6, y times 5 / 4.
    np.testing.assert_allclose(PADDED.points(np.array([[3, 2]]), (4, 6)), [[4, 2.5]])
    np.testing.assert_allclose(PADDED.boxes(np.array([[0, 0, 3, 4]]), (4, 6)), [[0, 0, 4, 5]])
    np.testing.assert_allclose(SQUASHED.boxes(np.array([[0, 0, 3, 4]]), (4, 6)), [[0, 0, 4, 8]])


def test_a_mask_input_is_clipped_and_its_padding_is_background() -> None:
    plane = PADDED.mask_input(np.full((2, 4), 99, np.float32), 4)[0]
    assert plane.tolist() == [[MASK_INPUT_CLIP] * 4] * 2 + [[-MASK_INPUT_CLIP] * 4] * 2
    assert SQUASHED.mask_input(np.full((2, 4), 3, np.float32), 4).tolist() == [[[3.0] * 4] * 4]


def test_logits_come_back_without_the_padding() -> None:
    low_res = torch.full((1, 1, 2, 2), -5.0)
    low_res[..., 0, :] = 5  # the upper half of the square: all of an image twice as wide as high
    assert (PADDED.upscaled(low_res, (4, 8))[..., :3, :] > 0).all()
    assert (SQUASHED.upscaled(low_res, (4, 8)) > 0).float().mean() == 0.5


def test_probabilities_are_resized_where_the_network_s_authors_do_so() -> None:
    low_res = torch.tensor([[[[9.0, -1.0]]]])
    as_logits, as_probabilities = SQUASHED, SquareFrame(8, squash=True, as_probabilities=True)
    # In the middle: (9 - 1) / 2 > 0 both ways, but p = (1 + .27) / 2 there; a quarter before the end only logits cross.
    assert as_logits.upscaled(low_res, (1, 4))[0, 0, 0].tolist() == pytest.approx([9, 6.5, 1.5, -1])
    p = (1 / (1 + np.exp(-9.0)), 1 / (1 + np.e))
    expected = [p[0], 0.75 * p[0] + 0.25 * p[1], 0.25 * p[0] + 0.75 * p[1], p[1]]
    logits = as_probabilities.upscaled(low_res, (1, 4))[0, 0, 0]
    assert torch.sigmoid(logits).tolist() == pytest.approx(expected, abs=1e-5)
    assert logits[2] < 0 < as_logits.upscaled(low_res, (1, 4))[0, 0, 0, 2]
