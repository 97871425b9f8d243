"""What MedSAM and LiteMedSAM are fed, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.segmenters.frame import SquareFrame
from kmine.segmenters.pixels import lite_medsam_pixels, medsam_pixels, min_max


def test_min_and_max_are_those_of_the_whole_image() -> None:
    values = np.array([[[20, 70], [120, 20]]], np.uint8)
    np.testing.assert_allclose(min_max(values), [[[0, 0.5], [1, 0]]])
    assert (min_max(np.full((3, 2, 2), 7, np.uint8)) == 0).all()


def test_medsam_squashes_and_keeps_what_needs_no_resizing() -> None:
    image = np.random.default_rng(0).integers(10, 200, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(medsam_pixels(image, SquareFrame(8, squash=True)), min_max(image.transpose(2, 0, 1)))
    # A ramp down the rows stays one at twice the rows and half the columns: pixel centres lie at (i + .5) / 2 - .5.
    rows = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[:, None], 64, axis=1)
    pixels = medsam_pixels(np.repeat(rows[..., None], 3, axis=2), SquareFrame(32, squash=True))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    expected = (np.arange(32) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(pixels[0, 4:-4] * 150, (expected * 10)[4:-4, None] + 0 * pixels[0, 4:-4], atol=1.5)
    np.testing.assert_array_equal(pixels[0], pixels[2])


def test_lite_medsam_averages_areas_and_pads_with_zeros() -> None:
    # (4, 2) with the longest side to 2: one column of two rows, each the mean of four pixels: 20 and 60.
    image = np.array([[10, 30], [20, 20], [50, 70], [60, 60]], np.uint8)
    pixels = lite_medsam_pixels(np.repeat(image[..., None], 3, axis=2), SquareFrame(2))
    np.testing.assert_allclose(pixels, [[[0, 0], [1, 0]]] * 3)


def test_medsam_s_resizing_is_that_of_scikit_image() -> None:
    transform = pytest.importorskip("skimage.transform")
    for seed, size in enumerate([(60, 150), (201, 97), (64, 64), (30, 40)]):
        image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        resized = transform.resize(image, (96, 96), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
        ours = medsam_pixels(image, SquareFrame(96, squash=True))
        # A value on the edge of a whole number may be cut to either.
        assert np.abs(ours - min_max(resized.transpose(2, 0, 1))).max() <= 1.01 / 255
        assert np.mean(ours != min_max(resized.transpose(2, 0, 1))) < 1e-3
