"""The model card: required notes, figures, escaping, no paths."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.made_up_run import case, make_run

from kmine.predict.card import model_card
from kmine.predict.run_model import open_run_model
from kmine.report.card import Card, Figures, render_card

NAN = float("nan")
CARD = Card(
    name="run",
    dataset="made up",
    class_names=("background", "polyp"),
    counts=(("labeled", 3),),
    split_rule="By group.",
    size=32,
    window=(-160.0, 240.0),
    method="mining",
    model="unet",
    segmenter="ellipse",
    round_idx=1,
    checkpoint="best",
    seed=0,
    figures=(Figures("validation", 3, 0.6, NAN, NAN, 0.3, 3.0, 0),),
    guarantee="Nothing",
    signatures=(("model", "abc"),),
    versions=(("kmine", "0"),),
)


@pytest.mark.parametrize(
    ("segmenter", "note"),
    [("ellipse", "ignores the image"), ("tiny", "not SAM"), ("tiny+adapted", "not SAM"), ("sam_vit_b", "")],
)
def test_a_stand_in_has_its_name_and_its_note(segmenter, note):
    text = render_card(replace(CARD, segmenter=segmenter))
    assert f"`{segmenter}`" in text and "Not a medical device" in text
    assert (note in text) if note else "stand-in" not in text


def test_a_name_cannot_break_a_line_or_a_table():
    text = render_card(replace(CARD, dataset="a | b\n# c <script>", class_names=("background", "x|y")))
    assert "a \\| b # c &lt;script>" in text and "x\\|y" in text and "\n# c" not in text


def test_figures_have_an_interval_or_its_absence():
    assert "| validation | 3 | 0.600 | none: one group |" in render_card(CARD)
    row = replace(CARD.figures[0], low=0.1, high=0.9)
    assert "[0.100, 0.900]" in render_card(replace(CARD, figures=(row,)))


def test_the_card_opens_with_its_best_figure_and_warns_by_weight():
    lines = render_card(CARD).splitlines()
    assert lines[2] == "**Dice 0.600 on 3 validation images**, without an interval; 0 missed objects."
    assert lines[3] == "It segments polyp; trained and measured on made up."
    warned = [line for line in lines if line.startswith("1. ")]
    assert ["test split" in warned[0], "3 images are few" in warned[1], "stand-in" in warned[2]] == [True] * 3
    tested = replace(CARD.figures[0], split="test", num_images=40, low=0.5, high=0.7)
    text = render_card(replace(CARD, figures=(*CARD.figures, tested), segmenter="sam_vit_b"))
    assert text.splitlines()[2].startswith("**Dice 0.600 on 40 test images**, 95 % interval [0.500, 0.700]; 0 missed")
    assert text.count("\n1. ") == 2 and "**Quality unknown**" in render_card(replace(CARD, figures=()))


def test_test_figures_appear_once_the_test_split_was_opened(tmp_path):
    run = make_run(tmp_path / "run", with_weights=False)
    before = model_card(open_run_model(run, None, "best"))
    assert "has not been opened" in before and "| validation | 3 | 0.600 | [" in before
    cases = {"cases": [case("d", 0.25), case("e", 0.75)]}
    arms = {"mining": {"chosen": cases, "final": cases}}
    (run / "test_metrics.json").write_text(json.dumps({"arms": arms}))
    after = model_card(open_run_model(run, None, "best"))
    assert "| test | 2 | 0.500 | [" in after and "has not been opened" not in after
    assert "| test |" not in model_card(open_run_model(run, 0, "best")), "figures of another round"


def test_the_card_holds_no_path(tmp_path):
    run = make_run(tmp_path / "run", with_weights=False, command=f"kmine loop --out {tmp_path}")
    assert str(tmp_path) not in model_card(open_run_model(run, None, "best"))
