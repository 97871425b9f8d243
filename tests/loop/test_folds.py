"""`data.folds`: a run for each fold and one on all masks; killed, resumed, and read as one by the other commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, UNET, run_loop
from helpers.small import same, weights

from kmine import cli
from kmine.compare import __main__ as compare
from kmine.compare.engine import compare_runs
from kmine.config import LoopConfig
from kmine.loop.folds import fold_settings, refuse_other_folder
from kmine.predict.run_model import open_run_model
from kmine.setup.finished import final_run, fold_runs
from kmine.store.run_folder import RunFolder
from kmine.training import trainer
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0

TINY = SMALL | UNET | FEW_STEPS | OPEN_GATE
TINY |= {"baseline": "true", "data.num_samples": 12, "data.label_fraction": 0.6, "adopt_tolerance": 1, "data.folds": 2}
NAMES = ("fold-0", "fold-1", "all")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folds(cache, tmp_path_factory):
    """The folder of an undisturbed run, with what it printed."""
    out = tmp_path_factory.mktemp("folds") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(cli.Terminal, "log", lambda self, text: lines.append(text))
        assert run_loop(TINY, out, cache) == 0
    return out, lines


def splits(run: Path) -> dict[str, str]:
    with (run / "splits.csv").open(newline="") as file:
        return {row["sample_id"]: row["split"] for row in csv.DictReader(file)}


def opened(run: Path) -> list[str]:
    return json.loads((run / "run.json").read_text()).get("test_opened", [])


def test_each_image_is_tested_once_and_the_last_run_has_all_masks(folds):
    out, _ = folds
    tested = [i for name in NAMES[:2] for i, side in splits(out / name).items() if side == "test"]
    assert len(tested) == len(set(tested)) == 12
    assert set(splits(out / "all")) == set(tested) and "test" not in splits(out / "all").values()
    assert [len(opened(out / name)) for name in NAMES] == [1, 1, 0]
    assert fold_runs(out) == [out / "fold-0", out / "fold-1"] and final_run(out) == out / "all"


def test_the_end_names_the_figures_of_all_folds_and_one_thing_to_do(folds):
    out, lines = folds
    assert any("of every image by models not trained on it" in line for line in lines)
    figures = [line for line in lines if line.startswith("  ")]
    assert [line.split("  ")[1] for line in figures] == [ROUND_0, EQUAL_STEPS, ONE_SCHEDULE, "mining (ellipse)"]
    table = compare_runs([out], device="cpu").table
    assert table.baseline in (EQUAL_STEPS, ONE_SCHEDULE)
    assert f"against {table.baseline}" in figures[3]
    assert any(line.startswith(f"results: {out / 'all'}") for line in lines)
    assert lines[-1].startswith(f"next: kmine predict {out / 'all'} IMAGES"), "the model of all masks; no test split"
    assert not any(line.startswith("next: kmine compare") for line in lines)
    assert all(f"{row.dice:.3f}" in line for row, line in zip(table.rows, figures, strict=True))
    assert "2 folds" in " ".join(table.notes) and "12 images" in table.notes[0]


def test_the_tables_pool_the_folds_and_a_second_look_opens_nothing(folds, capsys):
    out, _ = folds
    capsys.readouterr()
    assert compare.main([str(out)]) == 0
    assert (out / "test_table.md").read_text() == capsys.readouterr().out
    with (out / "test_cases.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["checkpoint"] == "chosen" and row["arm"] == ROUND_0]
    assert [row["sample_id"] for row in rows] == sorted(splits(out / "all"))
    by_fold = [json.loads((out / name / "test_metrics.json").read_text())["arms"][ROUND_0] for name in NAMES[:2]]
    of_fold = {case["sample_id"]: case["dice"] for arm in by_fold for case in arm["chosen"]["cases"]}
    assert all(float(row["dice"]) == pytest.approx(of_fold[row["sample_id"]]) for row in rows)
    assert [len(opened(out / name)) for name in NAMES[:2]] == [1, 1]
    assert compare.main([str(out), str(out)]) == 2
    assert "expected one run per seed" in capsys.readouterr().err


def test_the_model_to_use_is_that_of_all_masks(folds):
    out, _ = folds
    found = open_run_model(out, 0, "best")
    assert found.root == out / "all" and found.metadata.name == out.name
    assert open_run_model(out / "fold-0", 0, "best").metadata.name == "fold-0"


def test_a_kill_in_a_fold_loses_nothing_and_finished_folds_are_not_repeated(folds, cache, tmp_path, monkeypatch):
    out, trained, real, settings = tmp_path / "out", [], trainer.fit, TINY | {"baseline": "false"}

    def killed(*args, **kwargs):
        trained.append(len(trained))
        if len(trained) == 4:  # two trainings a run; the second of fold 1
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "fit", killed)
    assert run_loop(settings, out, cache) == 130
    assert fold_runs(out) and not (out / "all").exists() and opened(out / "fold-0") == []
    assert run_loop(settings, out, cache) == 0
    assert len(trained) == 3 * 2 + 1
    for name in NAMES:
        assert same(*(weights(RunFolder(base / name, follows=True), 1) for base in (folds[0], out)))
    trained.clear()
    assert run_loop(settings, out, cache) == 0 and not trained


def test_a_fold_alone_is_the_same_run(folds, cache, tmp_path):
    out = tmp_path / "alone"
    assert run_loop(TINY | {"baseline": "false"}, out, cache, data__fold=1) == 0
    pair = [RunFolder(root, follows=True) for root in (folds[0] / "fold-1", out)]
    assert same(*(weights(store, 1) for store in pair))


def test_another_folder_is_refused_with_what_it_holds(folds, tmp_path, capsys):
    out, _ = folds
    for changes, words in (({"data__folds": 3}, "data.folds 2, of which"), ({"data__folds": "null"}, "got None")):
        assert run_loop(TINY, out, tmp_path, **changes) == 2
        assert words in capsys.readouterr().err
    assert run_loop(TINY, out / "all", tmp_path) == 2
    assert "expected a folder for 2 folds, found a run" in capsys.readouterr().err
    refuse_other_folder(LoopConfig(out=str(tmp_path / "new")))


def test_the_settings_of_the_runs_differ_in_folder_and_fold_alone():
    cfg = cli.override(LoopConfig, cli.to_dict(LoopConfig(out="o")), {"data.folds": "3"}, "")
    runs = fold_settings(cfg)
    assert {name: (own.out, own.data.fold) for name, own in runs.items()} == {
        **{f"fold-{n}": (f"o/fold-{n}", n) for n in range(3)},
        "all": ("o/all", 3),
    }
    assert all(own.data.num_runs == 1 and own.data.folds == 3 for own in runs.values())
