"""Windowing: monotone, exact at both ends, independent of the block size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmine.data.io import windowing
from kmine.data.io.windowing import grey_as_rgb, windowed

NUMBERS = st.one_of(st.floats(), st.floats(-3000, 3000), st.sampled_from([0.0, -0.0, 1e300, -1e300]))


def test_a_window_by_hand():
    values = np.array([[-161, -160, -158, 40, 239.5, 240, 3000, np.nan]])
    # 2 HU above black are 1.275 steps of 255 / 400; the middle, 127.5, rounds to even; 399.5 HU are 254.7 steps
    assert windowed(values, (-160.0, 240.0)).tolist() == [[0, 0, 1, 128, 255, 255, 255, 0]]
    assert windowed(np.array([[0, 100, 255]], np.uint8), (-160.0, 240.0), 2.0, -160.0).tolist() == [[0, 128, 255]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(NUMBERS, min_size=2, max_size=30),
    st.tuples(st.floats(-2000, 2000), st.floats(0.5, 3000)),
    st.floats(0.01, 10),
    st.floats(-1000, 1000),
)
def test_windowing_is_monotone(values, window, slope, intercept):
    low, high = window[0], window[0] + window[1]
    rows = np.array(values)[:, None]
    grey = windowed(rows, (low, high), slope, intercept)
    assert grey.dtype == np.uint8 and grey.shape == rows.shape
    known = ~np.isnan(rows)
    assert (grey[~known] == 0).all()
    assert (np.diff(grey[known][np.argsort(rows[known], kind="stable")].astype(int)) >= 0).all()
    assert windowed(np.array([[low, high]]), (low, high)).tolist() == [[0, 255]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (50, 1), (37, 29)])
def test_blocks_do_not_change_the_result(monkeypatch, height, width):
    values = np.random.default_rng(0).normal(0, 300, (height, width))
    whole = windowed(values, (-160.0, 240.0))
    monkeypatch.setattr(windowing, "BLOCK", 64)
    np.testing.assert_array_equal(windowed(values, (-160.0, 240.0)), whole)


def test_grey_gets_three_equal_channels():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rgb = grey_as_rgb(grey)
    assert rgb.shape == (2, 3, 3) and all((rgb[..., channel] == grey).all() for channel in range(3))
