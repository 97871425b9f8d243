"""The network's input from prompts, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.segmenters.base import MASK_INPUT_CLIP, Embedding
from kmine.segmenters.tiny.crops import crop_queries, network_input, valid_region
from kmine.types import Prompts


def query(box, size=(40, 60), **prompts):
    """The row of a box on a black image; S = 32."""
    embedding = Embedding(size, image=np.zeros((*size, 3), np.uint8))
    return next(crop_queries(embedding, Prompts(1, np.array(box, np.float32), **prompts), side=32, name="tiny"))


def test_jittered_boxes_follow_their_box_with_windows_of_their_own() -> None:
    jittered = np.array([[12, 10, 16, 14], [8, 10, 12, 14]], np.float32)
    embedding = Embedding((40, 60), image=np.zeros((40, 60, 3), np.uint8))
    prompts = Prompts(1, np.array([10, 10, 14, 14], np.float32), jittered_boxes=jittered)
    rows = list(crop_queries(embedding, prompts, side=32, name="tiny"))
    assert [row.jittered for row in rows] == [False, True, True]
    assert [row.window.left for row in rows] == [4, 6, 2]


def test_the_valid_region_ends_at_the_border_of_the_image() -> None:
    # 17 pixels of the image to 32: a window from -6 has its first 6 / 17 x 32 = 11.3 columns outside.
    row = query((0, 10, 4, 14))
    assert (row.window.left, row.window.width) == (-6, 17)
    inside = valid_region(row)
    assert inside.all(axis=0).nonzero()[0].tolist() == list(range(11, 32))
    assert not inside[:, :11].any()


def test_rows_with_different_prompts_share_a_batch() -> None:
    points = {"point_coords": np.array([[12, 12], [11, 13]], np.float32), "point_labels": np.array([1, 0])}
    mask_input = np.full((40, 60), 50, np.float32)
    inputs = network_input([query((10, 10, 14, 14)), query((10, 10, 14, 14), **points, mask_input=mask_input)], "cpu")
    assert inputs.image.shape == (2, 3, 32, 32)
    assert inputs.point_labels.tolist() == [[-1, -1], [1, 0]]
    # Pixel 12 of the image is the middle of the window from 4 to 20: (12 - 4 + 0.5) x 32 / 17 - 0.5.
    np.testing.assert_allclose(inputs.points[1, 0], [15.5, 15.5], atol=1e-5)
    assert inputs.has_mask_input.tolist() == [0, 1]
    assert inputs.mask_input[0].abs().max() == 0
    assert (inputs.mask_input[1] == MASK_INPUT_CLIP).all()


def test_beyond_the_image_a_mask_input_is_certain_background() -> None:
    row = query((0, 10, 4, 14), mask_input=np.full((40, 60), 3, np.float32))
    plane = network_input([row], "cpu").mask_input[0, 0].numpy()
    assert (plane[~valid_region(row)] == -MASK_INPUT_CLIP).all() and (plane[valid_region(row)] == 3).all()


def test_an_embedding_without_its_image_is_refused() -> None:
    with pytest.raises(ValueError, match="encode the image again"):
        next(crop_queries(Embedding((40, 60)), Prompts(1, np.array([1, 1, 5, 5], np.float32)), side=32, name="tiny"))
