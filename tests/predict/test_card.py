"""The model card of a run: figures, split, sources; nothing of paths."""

from __future__ import annotations

import json

import pytest
from helpers.made_up_run import UNET, calibrated, case, make_run

from kmine.config import DataConfig
from kmine.io.files import nan_to_none
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
        ({"split_file": "splits.csv"}, "The split was given; no group"),
        ({"split_file": "splits.csv"}, "sides of it. Masks were used of 3 of the 5 training images."),
        ({"label_fraction": 0.5}, "Masks were used of 3 of the 5 training images."),
        ({"fine_groups": 2.0}, "Masks were used of 3 of the 5 training images (2 of 4 groups)."),
    ],
)
def test_the_rule_of_the_split_is_stated(tmp_path, settings, rule):
    data = DataConfig(name="folder", images="IMAGES", size=32, **settings)
    root = make_run(tmp_path / "run", model=UNET, with_weights=False, data=data)
    rows = ("d,p3,labeled", "e,p3,labeled", "f,p4,labeled", "g,p5,unlabeled", "h,p6,unlabeled")
    (root / "splits.csv").write_text("\n".join(("sample_id,group_id,split", "a,p1,val", *rows)))
    assert rule in card(root)


def test_a_share_of_one_is_called_all(run):
    rows = (f"i{n},p{n},labeled" for n in range(7))
    (run / "splits.csv").write_text("\n".join(("sample_id,group_id,split", "a,p1,val", *rows)))
    assert "Masks were used of all 7 training images." in card(run)


def test_clean_images_have_their_own_figures(run):
    """Three lesions, one missed; of two clean images one has a false alarm."""
    counts = {"a": (5, 10, 10), "b": (10, 10, 10), "c": (0, 0, 4), "d": (0, 3, 0), "e": (0, 0, 0)}
    dice = {"a": 0.5, "b": 1.0, "c": 0.0, "d": 0.0, "e": float("nan")}
    cases = [case(name, dice[name]) | {"counts": [triple]} for name, triple in counts.items()]
    (run / "round_01" / "metrics.json").write_text(json.dumps(nan_to_none({"metrics": {"cases": cases}})))
    text = card(run)
    assert "| validation | 5 | 0.375 |" in text and "| validation | 1 | 0.500 | 2 | 50 % |" in text
    assert "false alarms" not in card(run, 0), "without counts nothing is known of clean images"
