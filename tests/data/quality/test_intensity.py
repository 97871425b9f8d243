"""How bright images are: measures, ranges, and who lies outside."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.data.quality.intensity import how_far, measure, summarise


def flat(red: int, green: int, blue: int) -> np.ndarray:
    return np.tile(np.array([red, green, blue], np.uint8), (4, 4, 1))


def test_measures_of_a_case_done_by_hand():
    image = flat(0, 0, 0)
    image[:2] = 100
    assert measure(image).tolist() == [50, 50, 50, 50]
    assert measure(flat(10, 20, 30))[:3].tolist() == [10, 20, 30]


def test_training_images_are_never_far_from_themselves():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 2 ** rng.integers(1, 9), (8, 8, 3)).astype(np.uint8) for _ in range(40)]
    known = summarise(images)
    assert known["num_images"] == 40 and not any(how_far(known, image) for image in images)


def test_far_ones_are_named_with_the_range():
    known = summarise([flat(100, 100, 100 + n) for n in range(10)])
    assert how_far(known, flat(100, 100, 106)) == ""
    assert how_far(known, flat(200, 100, 100)) == "red 200 (training: 94 to 106)"


@pytest.mark.parametrize("known", [None, {}, {"num_images": 0}])
def test_nothing_known_is_nothing_said(known):
    assert how_far(known, flat(0, 0, 0)) == "" and summarise([]) == {"num_images": 0}
