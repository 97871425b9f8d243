"""Charts of a run: colours, series, calibration."""

from __future__ import annotations

from dataclasses import replace

from kmine.report.figures import coverage_chart, dice_chart, reliability_chart, svg_file
from kmine.report.inputs import Calibrated, RoundRow

NAN = float("nan")
ROWS = [
    RoundRow(0, 6, 0, 0.6, 0.5, 12.0, 2, 0.59, True, 0.6, 0.59, seconds={"fit": 65.0}),
    RoundRow(1, 6, 9, 0.7, 0.6, NAN, 1, 0.69, False, 0.6, NAN, 0.45, {"kept": 9}, 0.02, {"fit": 3.0}),
]


def test_a_chart_has_the_colour_of_the_text_around_and_names_the_segmenter():
    chart = dice_chart(ROWS, "tiny_x")
    assert chart.startswith("<svg") and chart.endswith("</svg>")
    assert "currentColor" in chart and "#010203" not in chart and "var(" not in chart
    assert "(segmenter: tiny_x)" in chart
    assert svg_file(chart).startswith('<svg xmlns="http://www.w3.org/2000/svg"') and svg_file("") == ""


def test_models_of_one_schedule_are_points_beside_the_rounds():
    once = replace(ROWS[-1], round_idx=9, retrained=True, by_model={"supervised_once": (0.5, 0.5, 0.0)})
    chart = dice_chart([*ROWS, once], "x")
    assert ">once<" in chart and "mining (x), trained once" in chart and "supervised, one schedule" in chart
    assert all(text not in dice_chart(ROWS, "x") for text in (">once<", "one schedule"))


def test_the_dice_chart_shows_a_baseline_only_if_there_is_one():
    assert dice_chart(ROWS, "x").count(">supervised, ") == 2
    assert "not adopted" in dice_chart(ROWS, "x")
    bare = dice_chart([RoundRow(0, 6, 0, 0.6, 0.5, 1.0, 0, 0.6, True)], "x")
    assert "supervised" not in bare and "not adopted" not in bare


def test_the_calibration_of_the_gate_is_drawn_if_there_is_one():
    found = Calibrated([(0.5, 0.9), (1.0, 0.7)], [(0.4, 0.5, 9), (0.8, 0.9, 10)], coverage=0.5, target=0.85)
    assert "the gate's threshold" in coverage_chart(found) and ">target<" in coverage_chart(found)
    assert "bins of 9 to 10 objects" in reliability_chart(found)
    assert coverage_chart(None) is None and reliability_chart(None) is None
