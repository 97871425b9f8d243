"""Cells of tables, and the table of rounds for the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kmine.report.inputs import RoundRow
from kmine.report.table import RoundsTable, duration, number, percent

NAN = float("nan")
ROWS = [
    RoundRow(0, 6, 0, 0.6, 0.5, 12.0, 2, 0.59, True, 0.6, 0.59, seconds={"fit": 65.0}),
    RoundRow(1, 6, 9, 0.7, 0.6, NAN, 1, 0.69, False, 0.6, NAN, 0.45, {"kept": 9}, 0.02, {"fit": 3.0}),
]


def shown(rows: list[RoundRow], segmenter: str, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(RoundsTable(rows, segmenter))
    return out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1.0 min"),
        (186, "3.1 min"),
        (3599, "1.0 h"),
        (7600, "2.1 h"),
        (NAN, "–"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_cells():
    assert (number(0.8125), number(NAN), number(None), number(float("inf"))) == ("0.812", "–", "–", "–")
    assert (percent(0.4), percent(0.034), percent(0.0), percent(None)) == ("40 %", "3.4 %", "0 %", "–")


def test_the_terminal_table_fits_80_columns():
    text = shown(ROWS, "sam_vit_b", 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "sam_vit_b" in text and "…" not in text and "nan" not in text
    assert "HD95" not in text
    assert "HD95" in shown(ROWS, "sam_vit_b", 160)


def test_clean_images_have_columns_that_fit_80_columns_too():
    figures = {"num_empty": 3, "num_clean": 9, "dice_lesion": 0.456, "false_alarm_rate": 0.53}
    rows = [replace(row, **figures, supervised_dice_lesion=0.321) for row in ROWS]
    text = shown(rows, "tiny+adapted", 80)
    assert "0.456" in text and "53 %" in text and "…" not in text and "0.321" not in text
    assert "0.321" in shown(rows, "tiny+adapted", 400) and "0.456" not in shown(ROWS, "tiny+adapted", 400)


def test_the_terminal_table_shows_names_literally_and_may_be_empty():
    assert "[bold]x" in shown(ROWS, "[bold]x", 120)
    assert "round" in shown([], "x", 80)


def test_a_round_shows_how_many_images_were_added_and_removed():
    moved = replace(ROWS[1], num_new=5, num_readmitted=2, num_removed=3)
    assert "+7 -3" in shown([ROWS[0], moved], "x", 400) and "+" not in shown(ROWS, "x", 400)


def test_a_refused_round_shows_the_reason_and_the_difference():
    change = {"difference": -0.034, "difference_low": -0.06, "difference_high": -0.01}
    refused = RoundRow(1, 6, 9, 0.7, 0.6, NAN, 1, 0.69, False, reason="refused: fell by 0.034", **change)
    wide = " ".join(shown([ROWS[0], refused], "x", 400).split())
    assert "no: fell by 0.034" in wide and "-0.034 [-0.060, -0.010]" in wide
    assert "no: fell by 0.034" in " ".join(shown([ROWS[0], refused], "x", 120).split())
    assert "gain" not in shown(ROWS, "x", 400), "nothing was compared"
