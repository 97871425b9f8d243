"""Statistics of images and masks, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_stats import phantom_image, square_mask

from kmine.data.quality.image_stats import compute_mask_stats, compute_stats


def test_counts_by_hand():
    image = np.full((4, 5, 3), 7, np.uint8)
    image[0, 0] = (0, 255, 7)
    mask = np.zeros((4, 5), np.uint8)
    mask[0] = 1
    mask[3, 0] = 255
    stats = compute_stats("a", image, mask)
    assert (stats.shape, stats.low, stats.high) == ((4, 5), 0, 255)
    assert stats.mask.pixels == {0: 14, 1: 5, 255: 1}
    assert stats.mask.foreground_share == 0.25
    assert stats.mask.rim_share == pytest.approx(7 / 18)  # corners belong to a row and to a column


def test_fingerprints_depend_on_every_pixel_and_on_the_shape():
    image = phantom_image(0)
    changed = image.copy()
    changed[50, 50, 0] ^= 1
    assert compute_stats("a", image, None).fingerprint == compute_stats("b", image.copy(), None).fingerprint
    assert compute_stats("a", image, None).fingerprint != compute_stats("a", changed, None).fingerprint
    flat = np.zeros((2, 6, 3), np.uint8)
    assert compute_stats("a", flat, None).fingerprint != compute_stats("a", flat.reshape(6, 2, 3), None).fingerprint


def test_a_mask_equal_to_the_bright_pixels_has_dice_1_with_the_image():
    mask = square_mask(10, 20)
    assert compute_mask_stats(mask, mask > 0).like_image == 1
    assert compute_mask_stats(mask, square_mask(15, 20) > 0).like_image == pytest.approx(2 * 25 / (100 + 25))
    assert compute_mask_stats(mask, np.ones((5, 5), bool)).like_image == 0
    assert not compute_mask_stats(mask).maybe_inverted and compute_mask_stats(1 - mask).maybe_inverted
