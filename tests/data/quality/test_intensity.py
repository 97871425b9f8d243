"""Intensity ranges: measures by hand, images outside the ranges."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.data.quality.intensity import intensity_ranges, measure, out_of_range_text


def flat(red: int, green: int, blue: int) -> np.ndarray:
    return np.tile(np.array([red, green, blue], np.uint8), (4, 4, 1))


def test_measures_by_hand():
    image = flat(0, 0, 0)
    image[:2] = 100
    assert measure(image).tolist() == [50, 50, 50, 50]
    assert measure(flat(10, 20, 30))[:3].tolist() == [10, 20, 30]


def test_training_images_lie_within_their_own_ranges():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 2 ** rng.integers(1, 9), (8, 8, 3)).astype(np.uint8) for _ in range(40)]
    known = intensity_ranges(images)
    assert known["num_images"] == 40 and not any(out_of_range_text(known, image) for image in images)


def test_an_image_outside_is_reported_with_the_range():
    known = intensity_ranges([flat(100, 100, 100 + n) for n in range(10)])
    assert out_of_range_text(known, flat(100, 100, 106)) == ""
    assert out_of_range_text(known, flat(200, 100, 100)) == "red 200 (training: 94 to 106)"


@pytest.mark.parametrize("known", [None, {}, {"num_images": 0}])
def test_without_ranges_nothing_is_reported(known):
    assert out_of_range_text(known, flat(0, 0, 0)) == "" and intensity_ranges([]) == {"num_images": 0}
