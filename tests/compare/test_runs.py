"""Runs to compare: what identifies a run, which runs fit into one table, which sweeps can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kmine.compare.runs import ComparedRun, find_runs, refuse_mixtures
from kmine.config import LoopConfig
from kmine.errors import UserError

SPLITS = [{"sample_id": name, "split": split} for name, split in (("a", "train"), ("b", "test"), ("c", "test"))]
RUN = ComparedRun(
    Path("one"), {"data_fingerprint": "f"}, LoopConfig(), {"model.name": "unet", "rounds": 1}, SPLITS, None
)
HEADER = "method,model,label_fraction,seed,status,run\n"


def other(**settings: object) -> ComparedRun:
    return replace(RUN, root=Path("two"), settings={**RUN.settings, **settings})


def test_a_trial_is_identified_by_its_row_and_a_run_by_its_settings():
    trial = replace(RUN, trial={"model": "sks", "label_fraction": "0.25", "seed": "7"})
    assert trial.model_fraction_seed == ("sks", 0.25, 7)
    cfg = RUN.cfg
    assert RUN.model_fraction_seed == (cfg.model.name, cfg.data.label_fraction, cfg.seed)
    assert RUN.test_ids == ["b", "c"]


@pytest.mark.parametrize("settings", [{}, {"seed": 1}, {"data.label_fraction": 0.5}, {"unknown_to_the_first": 3}])
def test_runs_may_differ_in_seed_labels_and_settings_that_one_lacks(settings):
    refuse_mixtures([RUN, other(**settings)])


def test_settings_of_a_model_count_between_runs_of_that_model_only():
    first = replace(RUN, settings={**RUN.settings, "model.width": 8})
    refuse_mixtures([first, other(**{"model.name": "sks", "model.width": 16})])
    with pytest.raises(UserError, match=r"two and one differ in model.width \(8 and 16\)"):
        refuse_mixtures([first, other(**{"model.width": 16})])


def test_other_data_are_refused_unless_the_images_are_copies():
    moved = replace(other(), info={"data_fingerprint": "g"})
    with pytest.raises(UserError, match="differ in data;"):
        refuse_mixtures([RUN, moved])
    contents = {"data_contents": {"images": "same"}}
    refuse_mixtures([replace(run, info=run.info | contents) for run in (RUN, moved)])


def test_another_test_split_is_refused_also_for_trials():
    trial = replace(other(rounds=5), trial={"method": "oracle"})
    refuse_mixtures([RUN, trial])
    with pytest.raises(UserError, match="differ in test split"):
        refuse_mixtures([RUN, replace(trial, splits=SPLITS[:2])])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,seed\noracle,0\n", "model is missing"),
        (HEADER + "oracle,unet,half,0,done,a\n", "expected numbers for label_fraction and seed"),
        (HEADER + "oracle,unet,0.5,0,failed,a\n", "none of the 1 trials"),
        (HEADER + "oracle,unet,0.5,0,done,a\n", "expected a run folder"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_one_error(tmp_path, text, message):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        find_runs([tmp_path], "cpu", None)


def test_folds_are_tested_on_what_all_of_them_hold_out_and_named_after_their_folder():
    folds = [replace(RUN, root=Path("out/fold-0")), replace(RUN, root=Path("out/fold-1"), splits=SPLITS[:2])]
    folds[1] = replace(folds[1], splits=[{"sample_id": "a", "split": "test"}])
    runs = [replace(fold, folds=folds) for fold in folds]
    assert [run.test_ids for run in runs] == [["a", "b", "c"]] * 2 and [run.name for run in runs] == ["out"] * 2
    refuse_mixtures(runs)
    with pytest.raises(UserError, match="differ in test split"):
        refuse_mixtures([*runs, RUN])
    assert RUN.name == "one"
