"""Gallery pictures: sizes, contours, hatching, prompts."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.report.inputs import GalleryItem
from kmine.report.panels import COLOURS, SIDE, draw_mask, draw_prompts, panels, thumbnail
from kmine.types import Prompts


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(1000, 500), (500, 1000), (32, 32), (1, 700)])
def test_thumbnail_has_one_longest_side(shape):
    small = thumbnail(black(*shape))
    assert max(small.shape) == SIDE
    assert min(small.shape[:2]) >= 1


def test_contours_have_the_colour_of_their_class():
    mask = np.zeros((64, 64), np.uint8)
    mask[8:28, 8:28], mask[36:60, 36:60] = 1, 2
    drawn = draw_mask(black(256, 256), mask)
    for class_id in (1, 2):
        assert (drawn == COLOURS[class_id]).all(-1).any()
    assert (drawn[:20, 200:] == 0).all()


def test_ignored_pixels_are_striped_grey():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    inside = draw_mask(black(256, 256), mask)[70:186, 70:186].reshape(-1, 3)
    assert len(np.unique(inside, axis=0)) == 2
    assert (inside == inside[:, :1]).all()


def test_an_empty_mask_does_not_change_the_image():
    image = np.full((256, 200, 3), 77, np.uint8)
    assert (draw_mask(image, np.zeros((30, 24), np.uint8)) == image).all()


def test_points_are_drawn_at_x_y():
    prompt = Prompts(1, None, np.array([[96, 16]], np.float32), np.array([1]))
    drawn = draw_prompts(black(128, 256), [prompt], (64, 128))
    rows, cols = np.nonzero(drawn.any(-1))
    assert abs(rows.mean() - 32.5) < 1 and abs(cols.mean() - 192.5) < 1


def test_a_box_is_drawn_at_its_corners():
    prompt = Prompts(1, np.array([10, 20, 50, 40], np.float32))
    rows, cols = np.nonzero((draw_prompts(black(64, 64), [prompt], (64, 64)) == COLOURS[1]).all(-1))
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == pytest.approx((10, 20, 50, 40), abs=2)


def test_panels_are_in_order_and_inputs_unchanged():
    image, mask = black(20, 30), np.ones((20, 30), np.uint8)
    item = GalleryItem("dropped", "s", 2, "low_agreement", {}, image, [], mask, mask)
    made = panels(item, "tiny")
    assert [p.caption for p in made] == ["image", "0 prompts", "local mask", "tiny mask", "no pseudo mask"]
    assert [p.uri is None for p in made] == [False] * 4 + [True]
    assert not image.any() and mask.all()
