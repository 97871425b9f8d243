"""The parts of the page: pictures, charts, cells, the table for the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from kmine.report import (
    Calibrated,
    GalleryItem,
    RoundRow,
    render_table,
)
from kmine.report.figures import (
    coverage_chart,
    dice_chart,
    reasons_chart,
    reliability_chart,
    seconds_chart,
)
from kmine.report.panels import (
    CLASS_COLOURS,
    SIDE,
    draw_mask,
    draw_prompts,
    panels,
    thumbnail,
)
from kmine.report.table import duration, number, percent
from kmine.types import REASONS, Prompts

NAN = float("nan")
ROWS = [
    RoundRow(0, 6, 0, 0.6, 0.5, 12.0, 2, 0.59, True, 0.6, 0.59, seconds={"fit": 65.0}),
    RoundRow(1, 6, 9, 0.7, 0.6, NAN, 1, 0.69, False, 0.6, NAN, 0.45, {"kept": 9}, 0.02, {"fit": 3.0}),
]


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def shown(rows: list[RoundRow], segmenter: str, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render_table(rows, segmenter))
    return out.getvalue()


@pytest.mark.parametrize("shape", [(1000, 500), (500, 1000), (32, 32), (1, 700)])
def test_thumbnail_has_one_longest_side(shape):
    small = thumbnail(black(*shape))
    assert max(small.shape) == SIDE
    assert min(small.shape[:2]) >= 1


def test_contour_has_its_class_colour_and_background_stays():
    mask = np.zeros((64, 64), np.uint8)
    mask[8:28, 8:28], mask[36:60, 36:60] = 1, 2
    drawn = draw_mask(black(256, 256), mask)
    for class_id in (1, 2):
        assert (drawn == CLASS_COLOURS[class_id - 1]).all(-1).any()
    assert (drawn[:20, 200:] == 0).all()


def test_ignore_pixels_are_striped_grey_and_no_class():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    inside = draw_mask(black(256, 256), mask)[70:186, 70:186].reshape(-1, 3)
    assert len(np.unique(inside, axis=0)) == 2
    assert (inside == inside[:, :1]).all()


def test_empty_mask_leaves_the_image_alone():
    image = np.full((256, 200, 3), 77, np.uint8)
    assert (draw_mask(image, np.zeros((30, 24), np.uint8)) == image).all()


def test_prompts_are_drawn_where_they_point_as_x_y():
    prompt = Prompts(1, None, np.array([[96, 16]], np.float32), np.array([1]))
    drawn = draw_prompts(black(128, 256), [prompt], (64, 128))
    rows, cols = np.nonzero(drawn.any(-1))
    assert abs(rows.mean() - 32.5) < 1 and abs(cols.mean() - 192.5) < 1


def test_box_is_drawn_at_its_corners():
    prompt = Prompts(1, np.array([10, 20, 50, 40], np.float32))
    rows, cols = np.nonzero((draw_prompts(black(64, 64), [prompt], (64, 64)) == CLASS_COLOURS[0]).all(-1))
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == pytest.approx((10, 20, 50, 40), abs=2)


def test_panels_come_in_order_and_leave_inputs_untouched():
    image, mask = black(20, 30), np.ones((20, 30), np.uint8)
    item = GalleryItem("dropped", "s", 2, "low_agreement", {}, image, [], mask, mask)
    made = panels(item, "tiny")
    assert [p.caption for p in made] == ["image", "0 prompts", "local mask", "tiny mask", "no pseudo mask"]
    assert [p.uri is None for p in made] == [False] * 4 + [True]
    assert not image.any() and mask.all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"category": "fine"}, "category"),
        ({"image": np.zeros((4, 4), np.uint8)}, "image must be"),
        ({"local_mask": np.zeros((4, 5), np.uint8)}, "local_mask must be"),
        ({"pseudo_mask": np.zeros((4, 4), np.int64)}, "pseudo_mask must be"),
    ],
)
def test_gallery_item_refuses_what_it_cannot_draw(change, match):
    mask = np.zeros((4, 4), np.uint8)
    good = {"category": "best", "image": black(4, 4), "local_mask": mask, "segmenter_mask": mask}
    with pytest.raises(ValueError, match=match):
        GalleryItem(sample_id="s", round_idx=1, reason="kept", scores={}, prompts=[], **(good | change))


def test_charts_follow_the_page_colours_and_carry_the_segmenter():
    for chart in (dice_chart(ROWS, "tiny_x"), reasons_chart(ROWS, "tiny_x"), seconds_chart(ROWS, "tiny_x")):
        assert chart.startswith("<svg") and chart.endswith("</svg>")
        assert "var(--ink)" in chart and "#010203" not in chart
        assert "(segmenter: tiny_x)" in chart


def test_dice_chart_shows_the_baseline_only_where_there_is_one():
    assert dice_chart(ROWS, "x").count(">supervised, ") == 2
    assert "not adopted" in dice_chart(ROWS, "x")
    alone = dice_chart([RoundRow(0, 6, 0, 0.6, 0.5, 1.0, 0, 0.6, True)], "x")
    assert "supervised" not in alone and "not adopted" not in alone


def test_nothing_to_chart_gives_no_chart():
    bare = [RoundRow(0, 6, 0, 0.6, 0.5, 1.0, 0, 0.6, True)]
    assert reasons_chart(bare, "x") is None
    assert seconds_chart(bare, "x") is None


def test_the_gate_s_calibration_is_drawn_where_there_is_one():
    found = Calibrated([(0.5, 0.9), (1.0, 0.7)], [(0.4, 0.5, 9), (0.8, 0.9, 10)], coverage=0.5, target=0.85)
    assert "the gate's threshold" in coverage_chart(found) and ">target<" in coverage_chart(found)
    assert "bins of 9 to 10 objects" in reliability_chart(found)
    assert coverage_chart(None) is None and reliability_chart(None) is None


def test_every_reason_has_its_own_colour():
    chart = reasons_chart([RoundRow(1, 6, 1, 0.6, 0.5, 1.0, 0, 0.6, True, reasons=dict.fromkeys(REASONS, 1))], "x")
    for reason in REASONS:
        assert f">{reason.replace('_', ' ')}</text>" in chart


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


def test_terminal_table_fits_eighty_columns_without_losing_a_figure():
    text = shown(ROWS, "sam_vit_b", 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "sam_vit_b" in text and "…" not in text and "nan" not in text
    assert "HD95" not in text
    assert "HD95" in shown(ROWS, "sam_vit_b", 160)


def test_terminal_table_takes_names_literally_and_no_rows():
    assert "[bold]x" in shown(ROWS, "[bold]x", 120)
    assert "round" in shown([], "x", 80)


def test_a_round_says_how_many_images_came_and_left():
    moved = replace(ROWS[1], num_new=5, num_readmitted=2, num_expelled=3)
    assert "+7 -3" in shown([ROWS[0], moved], "x", 400) and "+" not in shown(ROWS, "x", 400)


def test_a_refused_round_says_why_and_a_compared_one_by_how_much():
    change = {"difference": -0.034, "difference_low": -0.06, "difference_high": -0.01}
    refused = RoundRow(1, 6, 9, 0.7, 0.6, NAN, 1, 0.69, False, reason="refused: fell by 0.034", **change)
    wide = " ".join(shown([ROWS[0], refused], "x", 400).split())
    assert "no: fell by 0.034" in wide and "-0.034 [-0.060, -0.010]" in wide
    assert "no: fell by 0.034" in " ".join(shown([ROWS[0], refused], "x", 120).split())
    assert "gain" not in shown(ROWS, "x", 400), "nothing was compared"
