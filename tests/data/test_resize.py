"""Resizing by hand: averages, nearest ids, sums of probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.data.resize import Resizer, to_frame


def test_images_are_averaged_when_shrunk_and_interpolated_when_enlarged():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 200
    np.testing.assert_array_equal(Resizer(2).image(image)[..., 0], [[200, 0], [0, 0]])
    np.testing.assert_array_equal(Resizer(1).image(image), np.full((1, 1, 3), 50))
    assert Resizer(8).image(image).max() == 200 and Resizer(3).image(image[:2]).shape == (3, 3, 3)


def test_masks_keep_their_ids():
    mask = np.array([[0, 0, 255, 255], [0, 0, 255, 255], [1, 1, 2, 2], [1, 1, 2, 2]], np.uint8)
    np.testing.assert_array_equal(Resizer(2).mask(mask), [[0, 255], [1, 2]])
    assert set(np.unique(Resizer(7).mask(mask))) == {0, 1, 2, 255}


def test_a_shrunk_mask_has_the_class_that_covers_most_of_a_pixel():
    mask = np.array([[1, 0, 2, 2], [1, 1, 2, 255], [0, 255, 0, 0], [255, 255, 1, 1]], np.uint8)
    np.testing.assert_array_equal(Resizer(2).mask(mask), [[1, 2], [255, 0]])
    assert set(np.unique(Resizer(3).mask(mask))) <= {0, 1, 2, 255}
    thin = np.zeros((64, 64), np.uint8)
    thin[28:31] = 1  # three of the four rows of a pixel, none of which is the nearest
    assert Resizer(16).mask(thin[:, :32]).any() and Resizer(16).mask(thin).any()
    wide = np.zeros((8, 100), np.uint8)
    wide[:, 50:] = 3
    np.testing.assert_array_equal(Resizer(10).mask(wide)[0], [0] * 5 + [3] * 5)


def test_masks_of_older_caches_take_the_nearest_pixel():
    mask = np.arange(36, dtype=np.uint8).reshape(6, 6)
    np.testing.assert_array_equal(Resizer(2, by_area=False).mask(mask), mask[1::3, 1::3])


def test_probabilities_sum_to_1_in_the_native_frame():
    probs = np.random.default_rng(0).dirichlet((1, 1, 1), (5, 5)).transpose(2, 0, 1).astype(np.float32)
    native = to_frame(probs, 9, 13)
    assert native.shape == (3, 9, 13)
    np.testing.assert_allclose(native.sum(axis=0), 1, rtol=1e-5)
    assert to_frame(probs, 5, 5) is probs


@pytest.mark.parametrize(
    ("height", "width", "rows", "cols"), [(40, 80, 4, 8), (80, 40, 8, 4), (3, 80, 1, 8), (5, 5, 8, 8)]
)
def test_a_letterboxed_image_keeps_its_ratio_and_the_rest_is_ignored(height, width, rows, cols):
    resizer = Resizer(8, letterbox=True)
    image, mask = np.full((height, width, 3), 200, np.uint8), np.ones((height, width), np.uint8)
    square, of_mask = resizer.image(image), resizer.mask(mask)
    assert square.shape == (8, 8, 3) and (square[..., 0] == 200).sum() == rows * cols
    np.testing.assert_array_equal(of_mask == 1, square[..., 0] == 200)
    assert set(np.unique(of_mask)) <= {1, 255}
    content = resizer.content(square.transpose(2, 0, 1), height, width)
    assert content.shape == (3, rows, cols) and (content == 200).all()
    assert Resizer(8).content(square.transpose(2, 0, 1), height, width).shape == (3, 8, 8)


def test_squares_are_not_changed_by_a_letterbox():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Resizer(8, letterbox=True).image(image), Resizer(8).image(image))
    grey = image[..., 0] // 100
    np.testing.assert_array_equal(Resizer(8, letterbox=True).mask(grey), Resizer(8).mask(grey))
