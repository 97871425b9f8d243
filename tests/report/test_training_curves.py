"""Training curves: rounds follow one another, helpers are left out, a picture stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from kmine.report.training_curves import _lines, curves_picture, training_chart

ROWS = [
    ("mining", 0, 10, 0.5, 0.3),
    ("mining", 0, 20, 0.4, 0.5),
    ("fold_0", 0, 20, 0.4, 0.5),
    ("witness_fold_0", 0, 20, 0.4, 0.5),
    ("part_1", 1, 20, 0.4, 0.5),
    ("mining", 1, 5, 0.3, 0.6),
    ("mining", 3, 30, 0.3, 0.6),
    ("supervised", 1, 5, 0.3, 0.5),
    ("supervised", 2, 5, 0.3, 0.5),
    ("supervised_once", 2, 30, 0.2, 0.5),
]


def test_rounds_begin_where_the_last_one_ended_unless_trained_in_one_schedule():
    steps = {}
    for arm, at, *_ in _lines(ROWS, {3}):
        steps.setdefault(arm, []).append(at)
    assert steps == {"mining": [[10, 20], [25], [30]], "supervised": [[25], [30]], "supervised_once": [[30]]}


def test_the_chart_names_each_arm_once_and_no_helper():
    chart = training_chart(ROWS, {3})
    assert "currentColor" in chart
    for name in ("mining", "supervised", "supervised_once"):
        assert chart.count(f">{name}</text>") == 1
    assert "fold_0" not in chart
    assert training_chart([]) is None and curves_picture([]) == ""


def test_the_picture_stands_alone():
    picture = curves_picture(ROWS)
    assert "prefers-color-scheme:dark" in picture and picture.count("<style>") == 1
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
