"""The table of methods in four formats: the same cells, escaped for each."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kmine.report.comparison import (
    Comparison,
    ComparisonRow,
    comparison_columns,
    escape_latex,
    html,
    latex,
    markdown,
    tidy,
)

BASE = ComparisonRow("supervised", "unet", 0.1, 6, (0, 1), 0.7, 0.01, 0.69, 0.6, 12.34, 1.5, is_baseline=True)
BETTER = ComparisonRow(
    *("mining", "unet", 0.1, 6, (0, 1), 0.75, 0.01, 0.74, 0.66, 9.0, 0.5),
    difference=0.05,
    low=0.02,
    high=0.08,
    p_value=0.0001,
    p_holm=0.0004,
    seconds=125.0,
)
UNSURE = replace(BETTER, method="other", low=-0.01, p_holm=0.3)
EVIL = "<b>&_50%|$x\\"


def table(*rows: ComparisonRow, **more) -> Comparison:
    return replace(Comparison(rows or (BASE, BETTER, UNSURE), "supervised", "ellipse", ["A note."]), **more)


def test_markdown_by_hand():
    lines = markdown(table()).splitlines()
    assert lines[:2] == ["A note.", ""]
    assert lines[2].startswith("| method | Dice | sd over seeds | Dice, last step | IoU | HD95 (px or mm) | missed |")
    assert lines[4] == "| supervised | 0.700 | 0.010 | 0.690 | 0.600 | 12.3 | 1.5 | – | – | – |"
    assert lines[5] == (
        "| mining | 0.750 | 0.010 | 0.740 | 0.660 | 9.0 | 0.5 | +0.050 [+0.020, +0.080] | < 0.001 | 2.1 min |"
    )
    assert "+0.050 [-0.010, +0.080]; no difference shown | 0.300" in lines[6]


@pytest.mark.parametrize("change", [{"low": -0.001}, {"p_holm": 0.05}, {"p_holm": float("nan")}])
def test_a_difference_needs_interval_and_corrected_p(change):
    assert BETTER.is_shown and not replace(BETTER, **change).is_shown
    assert replace(BETTER, low=-0.08, high=-0.02).is_shown


def test_columns_equal_or_unknown_in_all_rows_are_left_out():
    def headings(*rows):
        return {column.heading for column in comparison_columns(table(*rows))}

    assert not headings(BASE, BASE) & {"model", "labels", "seeds", "time", "peak MB", "parameters"}
    assert "labels" in headings(BASE, replace(BETTER, label_fraction=0.5))
    assert {"model", "seeds"} <= headings(BASE, replace(BETTER, model="sks", seeds=(0,)))
    assert {"peak MB", "parameters"} <= headings(replace(BASE, peak_memory_mb=900.0, num_parameters=2e6))
    assert "| 2.00 M |" in markdown(table(replace(BASE, num_parameters=2e6)))


def test_latex_is_escaped_and_rows_have_equal_numbers_of_cells():
    text = latex(table(BASE, replace(BETTER, method=EVIL), notes=[f"Note {EVIL}"]))
    assert r"\textless{}b\textgreater{}\&\_50\%|\$x\textbackslash{}" in text
    body = text[text.index("\\toprule") : text.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3 and len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1
    assert {"\\midrule", "\\bottomrule", "\\end{tabular}", "\\end{table}"} <= set(text.splitlines())
    assert escape_latex("a\n b – ~^{}") == r"a b -- \textasciitilde{}\textasciicircum{}\{\}"
    assert "–" not in text


def test_html_is_escaped_and_self_contained():
    text = html(table(BASE, replace(BETTER, method=EVIL)))
    assert "<b>" not in text and "&lt;b&gt;&amp;_50%|$x\\" in text
    assert not re.search(r"(?:src|href)=\"(?!data:,\"|#)", text) and "url(" not in text and "<script" not in text
    assert text.count("<tr") == 3 and 'class="baseline"' in text and 'class="shown"' in text
    assert "+0.050 [+0.020, +0.080]" in text and "A note." in text and "var(--" not in text[text.index("<main>") :]


def test_the_page_opens_with_the_verdict_on_mining_and_shows_differences_in_narrow_windows():
    text = html(table(BASE, replace(UNSURE, num_pairs=54), replace(BETTER, num_pairs=54)))
    first = "mining gains 5.0 points of Dice over the baseline (95 % interval +2.0 to +8.0, image by image, on 54 pairs"
    assert text.index(">Better<") < text.index(first) < text.index("<h2>") and text.count('class="call"') == 1
    hidden = re.findall(r'<th scope="col" class="[^"]*more">(.*?)</th>', text)
    assert {"IoU", "HD95 (px or mm)", "p, Holm"} <= set(hidden) and not {"method", "Dice"} & set(hidden)
    shown = re.findall(r'<th scope="col"(?: class="num")?>(.*?)</th>', text)
    assert shown == ["method", "Dice", "difference in Dice"]
    assert ">No comparison<" in html(table(BASE))


def test_a_method_name_cannot_add_a_markdown_column():
    lines = markdown(table(BASE, replace(BETTER, method=EVIL))).splitlines()[2:]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_tidy_rows_hold_unrounded_figures_and_empty_cells():
    header, rows = tidy(table())
    first, second = (dict(zip(header, row, strict=True)) for row in rows[:2])
    assert first["difference"] == "" and first["seeds"] == "0 1" and first["shown"] is False
    assert (second["p_holm"], second["hd95"], second["shown"]) == (0.0004, 9.0, True)
