"""Mask arithmetic by hand, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from kmine.ops import masks

BITMAPS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


def disc(size: int, row: float, col: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:size, :size]
    return (rows - row) ** 2 + (cols - col) ** 2 <= radius**2


def test_components_are_8_connected_largest_first_and_filtered_by_area():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[1, 1] = True  # touch at a corner: one component of two
    mask[3:6, 4:7] = True
    mask[0, 7] = True
    found = masks.components(mask)
    assert [int(c.sum()) for c in found] == [9, 2, 1]
    assert [int(c.sum()) for c in masks.components(mask, min_area=2)] == [9, 2]
    assert [int(c.sum()) for c in masks.components(mask, most=1)] == [9]
    assert masks.components(np.zeros((4, 4), bool)) == []


def test_tight_box_is_xyxy_with_both_ends_inside():
    mask = np.zeros((10, 20), bool)
    mask[3:5, 7:12] = True
    assert masks.tight_box(mask).tolist() == [7, 3, 11, 4]
    with pytest.raises(ValueError, match="empty"):
        masks.tight_box(np.zeros((3, 3), bool))


def test_grow_box_by_share_at_least_two_pixels_and_clipped():
    box = np.array([10, 10, 110, 30], np.float32)
    assert masks.grow_box(box, 0.05, 200, 200).tolist() == [5, 8, 115, 32]
    assert masks.grow_box(np.array([0, 0, 9, 9], np.float32), 0.05, 10, 10).tolist() == [0, 0, 9, 9]


def test_jitter_stays_within_its_share_and_within_20_px_of_1024():
    box = np.array([100, 200, 900, 260], np.float32)
    shaken = masks.jitter_boxes(box, 500, 0.1, 1024, 1024, np.random.default_rng(0))
    moved = np.abs(shaken - box)
    assert moved[:, [0, 2]].max() <= 20  # 10 % of 800 would be 80
    assert 5 < moved[:, [1, 3]].max() <= 6  # 10 % of 60
    assert (moved.max(axis=0) > 4).all()


def test_inner_point_lies_inside_a_crescent_and_away_from_the_border_it_touches():
    crescent = disc(64, 32, 32, 25) & ~disc(64, 32, 42, 22)
    col, row = masks.inner_point(crescent).astype(int)
    assert crescent[row, col]
    rows, cols = np.nonzero(crescent)
    assert not crescent[int(rows.mean()), int(cols.mean())], "the centroid would have missed"
    at_border = np.zeros((21, 21), bool)
    at_border[:, :5] = True  # cut by three borders: deepest is the middle column, not column 0
    assert masks.inner_point(at_border)[0] == 2


def test_squared_depth_is_the_squared_distance_to_the_nearest_unset_pixel():
    mask = disc(40, 18, 21, 15) & ~disc(40, 10, 21, 4)
    unset = np.argwhere(~mask)
    nearest = [[((unset - (row, col)) ** 2).sum(axis=1).min() for col in range(40)] for row in range(40)]
    assert np.array_equal(masks.squared_depth(mask), nearest)


def test_of_equally_deep_pixels_the_first_is_the_inner_point_in_every_call():
    rng = np.random.default_rng(0)
    for _ in range(60):  # the last bits of OpenCV's distances change between calls
        height, width = rng.integers(8, 90, 2)
        mask = np.pad(np.ones((height, width), bool), 5)
        half = (min(height, width) - 1) // 2
        assert masks.inner_point(mask).tolist() == [5 + half, 5 + half]
        box = np.array([0, 0, width + 9, height + 9], np.float32)
        assert masks.outer_point(mask, box).tolist() == [0, 0]


def test_outer_point_is_far_from_the_mask_or_none():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:14] = True
    box = np.array([10, 10, 29, 29], np.float32)
    col, row = masks.outer_point(mask, box).astype(int)
    assert col == 29 and not mask[row, col]
    filled = np.zeros((40, 40), bool)
    filled[10:30, 10:30] = True
    assert masks.outer_point(filled, box) is None


def test_vote_has_a_doubtful_middle():
    stack = np.array([[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 0]]], bool)
    assert masks.vote(stack, 0.75).tolist() == [[1, 1, 0, 0]]
    assert masks.vote(stack[:2], 0.75).tolist() == [[1, 1, -1, 0]]


@given(BITMAPS)
@settings(max_examples=60, deadline=None)
def test_rle_is_lossless(mask):
    assert np.array_equal(masks.from_rle(masks.to_rle(mask), *mask.shape), mask)


@given(BITMAPS)
@settings(max_examples=60, deadline=None)
def test_components_partition_the_mask(mask):
    found = masks.components(mask)
    total = np.sum(found, axis=0) if found else np.zeros(mask.shape)
    assert np.array_equal(total, mask.astype(int))


@given(BITMAPS)
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_those_of_pycocotools(mask):
    column = np.concatenate([[False], mask.ravel(order="F"), [True, False]])  # a run ends where the value changes
    ends = np.flatnonzero(column[1:] != column[:-1])
    text = masks.to_rle(mask)
    assert masks.run_lengths(text).sum() == mask.size
    assert masks.run_lengths(text)[: len(ends) - 2].tolist() == np.diff(ends, prepend=0)[: len(ends) - 2].tolist()


@pytest.mark.parametrize("text", ["", "o", "5o", "~", "é", "ooooooooo0", "522000"])
def test_damaged_run_lengths_are_refused(text):
    with pytest.raises(ValueError, match="run lengths"):
        masks.from_rle(text, 4, 5)
