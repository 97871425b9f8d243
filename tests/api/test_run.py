"""A run folder opened for reading: plain values and tables, nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, run_loop

from kmine.api.run import open_run
from kmine.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run_loop({**SMALL, **FEW_STEPS, **OPEN_GATE, "rounds": 1, "segmenter.name": "ellipse"}, folder) == 0
    return open_run(folder)


def test_tables_agree_with_one_another(run):
    assert [result.round_idx for result in run.rounds] == [0, 1] == list(run.metrics["round"])
    unlabeled = set(run.splits.loc[run.splits["split"] == "unlabeled", "sample_id"])
    masks, decisions = run.pseudo_masks(1), run.decisions(1)
    assert len(masks) > 0 and set(masks) <= unlabeled
    assert set(decisions.loc[decisions["in_training"], "sample_id"]) == set(masks)
    assert {*run.prompts(1)["sample_id"]} <= unlabeled
    assert run.config.segmenter.name == "ellipse" and run.info["stopped_by"] == "rounds"


def test_pseudo_masks_are_class_ids_and_255(run):
    masks = run.pseudo_masks(1)
    for mask in masks.values():
        assert mask.ndim == 2 and {*mask.ravel().tolist()} <= {0, 1, 255}
    with pytest.raises(KeyError):
        masks["no such image"]


def test_reading_changes_no_file(run):
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    assert len(run.decisions()) == len(run.decisions(run.info["adopted_round"])) or not run.info["adopted_round"]
    assert before == {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a run folder with config\.yaml and run\.json"):
        open_run(tmp_path)


def test_a_run_stands_wherever_a_path_is_expected(run):
    assert Path(run) == run.root and open_run(run).root == run.root
