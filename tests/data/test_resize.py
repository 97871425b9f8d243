"""Resizing by hand: averages, nearest ids, sums of probabilities."""

from __future__ import annotations

import numpy as np

from kmine.data.resize import resize_image, resize_mask, to_frame


def test_images_are_averaged_when_shrunk_and_interpolated_when_enlarged():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 200
    np.testing.assert_array_equal(resize_image(image, 2)[..., 0], [[200, 0], [0, 0]])
    np.testing.assert_array_equal(resize_image(image, 1), np.full((1, 1, 3), 50))
    assert resize_image(image, 8).max() == 200 and resize_image(image[:2], 3).shape == (3, 3, 3)


def test_masks_keep_their_ids():
    mask = np.array([[0, 0, 255, 255], [0, 0, 255, 255], [1, 1, 2, 2], [1, 1, 2, 2]], np.uint8)
    np.testing.assert_array_equal(resize_mask(mask, 2), [[0, 255], [1, 2]])
    assert set(np.unique(resize_mask(mask, 7))) == {0, 1, 2, 255}


def test_a_shrunk_mask_has_the_class_that_covers_most_of_a_pixel():
    mask = np.array([[1, 0, 2, 2], [1, 1, 2, 255], [0, 255, 0, 0], [255, 255, 1, 1]], np.uint8)
    np.testing.assert_array_equal(resize_mask(mask, 2), [[1, 2], [255, 0]])
    assert set(np.unique(resize_mask(mask, 3))) <= {0, 1, 2, 255}
    thin = np.zeros((64, 64), np.uint8)
    thin[28:31] = 1  # three of the four rows of a pixel, none of which is the nearest
    assert resize_mask(thin[:, :32], 16).any() and resize_mask(thin, 16).any()
    wide = np.zeros((8, 100), np.uint8)
    wide[:, 50:] = 3
    np.testing.assert_array_equal(resize_mask(wide, 10)[0], [0] * 5 + [3] * 5)


def test_masks_of_older_caches_take_the_nearest_pixel():
    mask = np.arange(36, dtype=np.uint8).reshape(6, 6)
    np.testing.assert_array_equal(resize_mask(mask, 2, by_area=False), mask[1::3, 1::3])


def test_probabilities_sum_to_1_in_the_native_frame():
    probs = np.random.default_rng(0).dirichlet((1, 1, 1), (5, 5)).transpose(2, 0, 1).astype(np.float32)
    native = to_frame(probs, 9, 13)
    assert native.shape == (3, 9, 13)
    np.testing.assert_allclose(native.sum(axis=0), 1, rtol=1e-5)
    assert to_frame(probs, 5, 5) is probs
