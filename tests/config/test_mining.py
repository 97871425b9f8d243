"""Settings of mining refuse values out of range."""

from __future__ import annotations

import pytest
from helpers.settings import assert_refused

from kmine.config import (
    GateConfig,
    PromptsConfig,
    RefineConfig,
    SegmenterConfig,
)
from kmine.errors import UserError

OUT_OF_RANGE = [
    (PromptsConfig, "min_area_px", 0),
    (PromptsConfig, "min_area_fraction", -0.1),
    (PromptsConfig, "max_objects", 0),
    (PromptsConfig, "box_margin", 1.1),
    (PromptsConfig, "num_jitters", 17),
    (PromptsConfig, "jitter", 0.5),
    (SegmenterConfig, "batch_size", 0),
    (GateConfig, "keep", 0.0),
    (GateConfig, "keep", 1.1),
    (RefineConfig, "min_vote", 0.5),
    (RefineConfig, "min_vote", 1.1),
    (RefineConfig, "doubt", 0.0),
    (RefineConfig, "doubt", 0.6),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(kind, name, value):
    assert_refused(kind, name, value)


def test_prompts_need_a_box_or_points():
    with pytest.raises(UserError, match=r"prompts\.box, prompts\.points: expected at least one"):
        PromptsConfig(box=False, points=False)
    assert PromptsConfig(box=False, points=True).points


def test_box_scales_and_the_doubtful_level_are_checked_by_name():
    for scales in ((), (1.0, 1.0), (0.5,), (5.0,), tuple(1 + n / 10 for n in range(9))):
        with pytest.raises(UserError, match=r"prompts\.box_scales: expected 1 to 8 different numbers from 1 to 4"):
            PromptsConfig(box_scales=scales)
    for level in (0.0, 0.5, -0.1):
        with pytest.raises(UserError, match=r"prompts\.doubtful: expected a number above 0 and below 0\.5, or null"):
            PromptsConfig(doubtful=level)
    assert PromptsConfig(box_scales=(1.0, 1.2, 1.5), doubtful=0.2).doubtful == 0.2
