"""Geometry of windows by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.segmenters.tiny.window import Window, window_of


def test_the_window_by_hand() -> None:
    # Box 40 wide and 30 high round (30, 45): 1.8 times that is 72 x 54, from -6 to 66 and from 18 to 72.
    # A pixel reaches half a pixel to either side of its centre, so the window starts at -6 and ends after 66.
    window = window_of(np.array([10, 30, 50, 60]), 96)
    assert (window.left, window.top, window.width, window.height) == (-6, 18, 73, 55)
    # Box 100 x 10: shown as if it were 50 high, 90 px; round (60, 45) from 0 to 90.
    flat = window_of(np.array([10, 40, 110, 50]), 96)
    assert (flat.top, flat.height, flat.left, flat.width) == (0, 91, -30, 181)
    # A dot is seen in 16 pixels.
    assert window_of(np.array([4, 4, 5, 5]), 96).width == 16


def test_coordinates_by_hand_on_a_window_that_is_not_square() -> None:
    # 48 x 24 pixels to 96 x 96: factors 2 and 4; the outer corner (9.5, 19.5) is the crop's outer corner.
    window = Window(left=10, top=20, width=48, height=24, side=96)
    np.testing.assert_allclose(window.to_crop(np.array([[9.5, 19.5], [10, 20], [57.5, 43.5]])),
                               [[-0.5, -0.5], [0.5, 1.5], [95.5, 95.5]])  # fmt: skip
    np.testing.assert_allclose(window.limits((30, 40)), [-20.5, -80.5, 59.5, 39.5])


def test_pixels_of_a_crop_lie_where_converted_points_lie() -> None:
    # One bright pixel at row 25, column 30 of a wide image.
    image = np.zeros((40, 90, 3), np.uint8)
    image[25, 30] = 255
    window = Window(left=10, top=20, width=48, height=24, side=96)
    crop = window.crop(image)[..., 0].astype(float)
    x, y = window.to_crop(np.array([30, 25]))
    rows, columns = np.indices(crop.shape)
    assert (crop * columns).sum() / crop.sum() == pytest.approx(x, abs=0.05)
    assert (crop * rows).sum() / crop.sum() == pytest.approx(y, abs=0.05)


def test_a_linear_ramp_survives_crop_and_inverse() -> None:
    rows, columns = np.mgrid[:40, :60].astype(np.float32)
    slope = 2 * rows - columns
    window = Window(left=20, top=-8, width=64, height=30, side=96)
    part, where = window.paste(window.crop(slope), slope.shape), window.visible(slope.shape)
    assert where == (slice(0, 22), slice(20, 60))
    np.testing.assert_allclose(part[2:-2, 2:-2], slope[where][2:-2, 2:-2], atol=0.1)
