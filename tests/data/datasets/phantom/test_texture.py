"""Building blocks of the phantoms: outlines, layers and noise by hand; scenes do not depend on the size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kmine.data.datasets.phantom.texture import (
    Blob,
    blur,
    log_uniform,
    mask_of,
    octave_noise,
    paint,
    photograph,
    pixel_grid,
    slopes,
    smooth_noise,
    soft_step,
)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_pixel_centres_are_inside_the_unit_square():
    x, y = pixel_grid(4)
    assert x[0].tolist() == [0.125, 0.375, 0.625, 0.875] and (y == x.T).all()


def test_log_uniform_draws_as_many_small_as_large_numbers():
    rng = generator()
    drawn = np.array([log_uniform(rng, 0.01, 1) for _ in range(2000)])
    assert drawn.min() >= 0.01 and drawn.max() <= 1
    assert 0.45 < (drawn < 0.1).mean() < 0.55


@pytest.mark.parametrize(
    "draw", [lambda rng, size: smooth_noise(rng, size, 4), lambda rng, size: octave_noise(rng, size, 3, 3)]
)
def test_noise_draws_the_same_numbers_at_every_size(draw):
    states = []
    for size in (32, 48):
        rng = generator()
        noise = draw(rng, size)
        assert noise.shape == (size, size) and noise.dtype == np.float32 and 0.4 < noise.std() < 1.6
        states.append(rng.bit_generator.state)
    assert states[0] == states[1]


def test_a_circle_has_the_depth_of_its_radius_in_the_centre():
    x, y = pixel_grid(101)
    circle = Blob(0.5, 0.5, 0.2, 1.0, 0.0, ())
    depth = circle.depth(x, y)
    assert depth[50, 50] == pytest.approx(0.2, abs=1e-6)
    assert mask_of(depth).mean() == pytest.approx(math.pi * 0.2**2, rel=0.02)
    assert circle.point(1.0, 0.0) == pytest.approx((0.7, 0.5)) and circle.point(0.0, 1.0) == (0.5, 0.5)


def test_points_of_an_irregular_outline_have_depth_0():
    blob = Blob.draw(generator(), 0.4, 0.6, 0.2)
    for theta in np.linspace(0, 6, 7):
        x, y = (np.full((1, 1), value, np.float32) for value in blob.point(1.0, theta))
        assert abs(float(blob.depth(x, y)[0, 0])) < 1e-5


def test_a_mask_has_at_least_the_deepest_visible_pixel():
    depth = np.array([[-3, -1], [-2, -4]], np.float32)
    assert mask_of(depth).tolist() == [[0, 1], [0, 0]]
    assert mask_of(depth, np.array([[True, False], [True, True]])).tolist() == [[0, 0], [1, 0]]


def test_layers_are_blended_by_alpha():
    assert soft_step(np.zeros(1, np.float32), 0.1) == 0.5
    plane = np.array([0.0, 1.0], np.float32)
    paint(plane, 0.5, np.array([1.0, 0.5], np.float32))
    assert plane.tolist() == [0.5, 0.75]


def test_slopes_are_heights_per_image_width():
    x, y = pixel_grid(64)
    across, down = slopes(3 * x - 2 * y)
    np.testing.assert_allclose(across[1:-1, 1:-1], 3, rtol=1e-4)
    np.testing.assert_allclose(down[1:-1, 1:-1], -2, rtol=1e-4)
    assert blur(x, 0.001) is x, "less than a quarter of a pixel"


def test_a_photograph_is_8_bit_rgb():
    for picture in (np.full((40, 40), 0.5, np.float32), np.full((40, 40, 3), 0.5, np.float32)):
        shot = photograph(generator(), picture, 0.01, 0.0)
        assert shot.shape == (40, 40, 3) and shot.dtype == np.uint8
        assert abs(shot.mean() - 127.5) < 2 and 1 < shot.std() < 5
