"""The model card of a run: figures, split, sources; nothing of paths."""

from __future__ import annotations

import json

import pytest
from helpers.made_up_run import UNET, calibrated, case, make_run

from kmine.config import DataConfig
from kmine.predict.card import model_card
from kmine.predict.run_model import open_run_model


def card(root, round_idx=None, checkpoint="best") -> str:
    return model_card(open_run_model(root, round_idx, checkpoint))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", with_weights=False, command="kmine loop --data.root /secret/place")


def test_validation_figures_are_those_of_the_checkpoint(run):
    text = card(run)
    assert "0.600" in text, "the mean Dice of metrics.json"
    assert "encoder tu-resnet10t, from random weights" in text and "made up" in text and "None: the run has no" in text


def test_the_card_holds_no_path_of_the_run(run):
    assert "/secret/place" not in card(run) and str(run) not in card(run)


def test_test_figures_are_of_the_adopted_round_only(run):
    opened = {"mining": {"chosen": {"cases": [case("t", 0.123)]}}}
    before = card(run)
    (run / "test_metrics.json").write_text(json.dumps({"arms": opened}))
    assert "0.123" not in before and "0.123" in card(run) and "0.123" not in card(run, 0)
    assert "0.123" not in card(run, checkpoint="final")


def test_a_calibrated_run_has_its_estimates_in_the_card(run):
    assert "rank correlation with true Dice 0.62" in card(calibrated(run))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"split_file": "splits.csv"}, "The split was given"),
        ({"label_fraction": 0.25}, "Masks were used of 0.25 of the training images"),
        ({"fine_groups": 7.0}, "Masks were used of 7 of the training groups"),
    ],
)
def test_the_rule_of_the_split_is_stated(tmp_path, settings, rule):
    data = DataConfig(name="folder", images="IMAGES", size=32, **settings)
    assert rule in card(make_run(tmp_path / "run", model=UNET, with_weights=False, data=data))
