"""Checks of settings: bounds are exact, messages name field and value."""

from __future__ import annotations

import math

import pytest

from kmine.config.checks import fraction, is_count, is_range, require
from kmine.errors import UserError


def test_require_names_field_expectation_and_value():
    require(True, "a.b", "anything", 3)
    with pytest.raises(UserError, match=r"^a\.b: expected at least 4, got 3$"):
        require(False, "a.b", "at least 4", 3)


@pytest.mark.parametrize(
    ("value", "closed_low", "ok"), [(0, False, False), (0, True, True), (1, False, True), (1.01, True, False)]
)
def test_a_fraction_is_open_at_zero_unless_closed(value, closed_low, ok):
    if ok:
        fraction(value, "x", closed_low=closed_low)
    else:
        with pytest.raises(UserError, match=r"^x: expected a fraction in [\[(]0, 1\]"):
            fraction(value, "x", closed_low=closed_low)


@pytest.mark.parametrize(
    ("pair", "ok"), [((0, 1), True), ((1, 1), False), ((1, 0), False), ((0, math.inf), False), ((math.nan, 1), False)]
)
def test_a_range_rises_and_is_finite(pair, ok):
    assert is_range(pair) is ok


@pytest.mark.parametrize(("value", "ok"), [(1, True), (2.0, True), (0, False), (1.5, False)])
def test_a_count_is_whole_and_at_least_one(value, ok):
    assert is_count(value) is ok
