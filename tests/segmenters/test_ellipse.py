"""The ellipse, drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.segmenter_suite import SegmenterSuite

from kmine.errors import UserError
from kmine.segmenters.ellipse import Ellipse, ellipse_mask
from kmine.types import Prompts


class TestEllipse(SegmenterSuite):
    @pytest.fixture
    def segmenter(self):
        return Ellipse()

    @pytest.fixture
    def other(self):
        return None


def rows(text: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in line] for line in text.split()])


@pytest.mark.parametrize(
    ("box", "drawing"),
    [
        # Centre (2, 2), radii 2 and 2: (1, 1) lies at distance 1.41 inside, (0, 1) at 2.24 outside.
        ((0, 0, 4, 4), "..#.. .###. ##### .###. ..#.."),
        # Centre (2, 1), radii 2 and 1: (1, 0) has 1/4 + 1 > 1, outside.
        ((0, 0, 4, 2), "..#.. ##### ..#.. ..... ....."),
        # Centre (2.5, 2.5), radii 1 and 1: four centres at distance 0.71.
        ((1.5, 1.5, 3.5, 3.5), "..... ..... ..##. ..##. ....."),
        # No pixel centre inside.
        ((1.2, 1.2, 1.8, 1.8), "..... ..... ..... ..... ....."),
    ],
)
def test_ellipses_by_hand(box, drawing) -> None:
    np.testing.assert_array_equal(ellipse_mask(np.array(box, np.float32), (5, 5)), rows(drawing))


def test_x_is_the_column() -> None:
    mask = ellipse_mask(np.array([0, 0, 8, 2], np.float32), (20, 30))
    assert mask.any(axis=0).nonzero()[0].tolist() == list(range(9))
    assert mask.any(axis=1).nonzero()[0].tolist() == [0, 1, 2]


def test_a_large_ellipse_covers_pi_quarters_of_its_box() -> None:
    mask = ellipse_mask(np.array([10, 20, 410, 220], np.float32), (300, 500))
    assert mask.sum() / (400 * 200) == pytest.approx(np.pi / 4, rel=1e-3)


def test_there_are_no_scores_and_points_and_mask_inputs_are_ignored() -> None:
    segmenter = Ellipse()
    embeddings = segmenter.encode([np.zeros((5, 5, 3), np.uint8)])
    assert embeddings[0].features is None
    box = np.array([0, 0, 4, 4], np.float32)
    points = {"point_coords": np.array([[4, 0]], np.float32), "point_labels": np.array([1])}
    plain, guided = segmenter.decode(
        embeddings, [[Prompts(1, box), Prompts(1, box, **points, mask_input=np.ones((5, 5), np.float32))]]
    )[0]
    np.testing.assert_array_equal(plain.masks, guided.masks)
    assert np.isnan(plain.predicted_iou).all()
    assert np.isnan(plain.stability_score).all()
    assert plain.low_res_logits is None
    assert plain.best == 0


def test_points_without_a_box_are_refused_with_the_setting() -> None:
    segmenter = Ellipse()
    prompts = Prompts(1, None, np.array([[2, 2]], np.float32), np.array([1]))
    with pytest.raises(UserError, match=r"prompts\.box"):
        segmenter.decode(segmenter.encode([np.zeros((5, 5, 3), np.uint8)]), [[prompts]])
