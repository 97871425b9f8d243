"""Settings of the compared methods refuse values out of range."""

from __future__ import annotations

import pytest
from helpers.settings import assert_refused

from kmine.config import (
    FixmatchConfig,
    TeacherConfig,
)

OUT_OF_RANGE = [
    (TeacherConfig, "weight", -1.0),
    (TeacherConfig, "weight", float("inf")),
    (TeacherConfig, "ramp_up", 1.1),
    (TeacherConfig, "decay", 0.0),
    (TeacherConfig, "decay", 1.0),
    (FixmatchConfig, "weight", -1.0),
    (FixmatchConfig, "weight", float("nan")),
    (FixmatchConfig, "threshold", 1.1),
    (FixmatchConfig, "cutmix", -0.1),
    (FixmatchConfig, "feature_perturbation", 1.0),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(kind, name, value):
    assert_refused(kind, name, value)
