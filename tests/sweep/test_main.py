"""`kmine sweep`: equal budgets, one test split, shared round 0, resumed and failed trials."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.loop_command import move_pictures, run_loop, write_pictures
from helpers.sources import documented
from helpers.sweep_command import (
    MEASURED,
    TINY,
    run_sweep,
    table,
)
from PIL import Image

from kmine.compare import __main__ as compare
from kmine.config.sweep import METHODS, SweepConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.errors import UserError
from kmine.store.run_folder import RunFolder
from kmine.sweep import training
from kmine.sweep.plan import COLUMNS

BOTH = ("--fractions", "0.3", "1", "--seeds", "0", "--methods", "supervised", "mining", "oracle")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Path, set[str]]:
    """A finished sweep, its cache, and the ids of all masks that it read."""
    base, read_ids = tmp_path_factory.mktemp("sweep"), set()
    read = SampleCache.mask_resized

    def reading(self: SampleCache, sample_id: str):
        read_ids.add(sample_id)
        return read(self, sample_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleCache, "mask_resized", reading)
        assert run_sweep(base / "out", base / "cache", *BOTH) == 0
    return base / "out", base / "cache", read_ids


def splits(folder: Path) -> dict[str, set[str]]:
    store, found = RunFolder(folder), {}
    for row in store.read_csv("splits.csv"):
        found.setdefault(row["split"], set()).add(row["sample_id"])
    store.close()
    return found


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# -- results


def test_every_trial_is_a_row_with_the_same_number_of_steps(swept):
    rows = table(swept[0])
    assert tuple(rows[0]) == COLUMNS
    assert [(row["method"], row["label_fraction"]) for row in rows] == [
        *(("supervised", "0.3"), ("mining", "0.3"), ("oracle", "0.3"), ("supervised", "1.0"))
    ]
    for row in rows:
        info = run_json(swept[0] / row["run"])
        assert (row["status"], row["error"], row["seed"], row["steps"]) == ("done", "", "0", "7")
        assert (info["method"], info["stopped_by"], info["steps"]) == (row["method"], "rounds", 7)
        assert 0 <= float(row["val_dice"]) <= 1 and float(row["seconds"]) > 0 and int(row["num_parameters"]) > 1e4
        drawn = splits(swept[0] / row["run"])
        assert int(row["num_labeled"]) == len(drawn["labeled"])
        assert int(row["num_unlabeled"]) == len(drawn.get("unlabeled", ()))


def test_trials_share_validation_and_test_images_and_labels_are_nested(swept):
    few, all_labels = (splits(swept[0] / "cells" / f"unetpp-{n}-0-supervised") for n in ("0.3", "1.0"))
    assert few["labeled"] < all_labels["labeled"]
    assert few["test"] == all_labels["test"] and few["val"] == all_labels["val"]


def test_no_trial_reads_test_masks_and_only_the_oracle_reads_unlabeled_ones(swept, tmp_path, monkeypatch):
    out, cache, read_ids = swept
    drawn = splits(out / "cells" / "unetpp-0.3-0-oracle")
    assert read_ids == drawn["labeled"] | drawn["val"] | drawn["unlabeled"]
    assert not [path for path in out.glob("cells/*/run.json") if "test_opened" in path.read_text()]
    seen = set()
    read = SampleCache.mask_resized
    monkeypatch.setattr(SampleCache, "mask_resized", lambda self, i: (seen.add(i), read(self, i))[1])
    run_sweep(tmp_path / "no_oracle", cache, "--fractions", "0.3", "--seeds", "0", "--methods", "mining")
    assert seen == drawn["labeled"] | drawn["val"]


def test_compare_evaluates_a_sweep_on_the_test_split(swept, tmp_path, capsys):
    folder = shutil.copytree(swept[0], tmp_path / "copy")
    assert compare.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert (
        "mining (ellipse)" in shown and "oracle (true masks: a ceiling)" in shown and "| 1 (13) | supervised" in shown
    )


# -- resumed


def test_the_same_command_again_trains_nothing(swept, monkeypatch, capsys):
    before = (swept[0] / "sweep.csv").read_bytes()
    monkeypatch.setattr(training, "run_trial", None)
    assert run_sweep(*swept[:2], *BOTH) == 0
    assert (swept[0] / "sweep.csv").read_bytes() == before
    assert "4 trials, 4 of them done; 2 skipped" in capsys.readouterr().err


def test_siblings_share_round_0_and_results_are_those_without_sharing(swept, tmp_path, monkeypatch):
    names = [swept[0] / "cells" / f"unetpp-0.3-0-{m}" / "round_00" / "model.safetensors" for m in METHODS.names()]
    assert len({name.stat().st_ino for name in names if name.exists()}) == 1
    monkeypatch.setattr(training, "link_shared_artifacts", lambda source, target: None)
    assert run_sweep(tmp_path / "unshared", swept[1], *BOTH) == 0
    assert table(tmp_path / "unshared", MEASURED) == table(swept[0], MEASURED)
    for name in swept[0].glob("cells/*/*/round_01/*.safetensors"):
        other = tmp_path / "unshared" / name.relative_to(swept[0])
        assert weights(name) == weights(other)


def weights(path: Path) -> bytes:
    """Without the header, which holds seconds."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_added_trials_leave_earlier_rows_unchanged(swept, tmp_path):
    folder = Path(shutil.copytree(swept[0], tmp_path / "more"))
    assert run_sweep(folder, swept[1], "--fractions", "0.3", "--seeds", "0", "--methods", "mean_teacher") == 0
    assert table(folder)[:4] == table(swept[0])
    assert [row["method"] for row in table(folder)[4:]] == ["mean_teacher"]


# -- failures


def test_a_sweep_resumes_with_copied_data_and_refuses_changed_ones(tmp_path, capsys):
    write_pictures(tmp_path / "here", 24)

    def go_on(name: str, *seeds: str) -> int:
        places = {"data__images": tmp_path / name / "images", "data__masks": tmp_path / name / "masks"}
        words = ("--methods", "supervised", "--fractions", "0.3", "--seeds", *seeds)
        changes = {"data__name": "folder", "data__duplicate_distance": -1, **places}
        return run_sweep(tmp_path / "sweep", tmp_path / "cache", *words, **changes)

    assert go_on("here", "0") == 0
    (first,) = table(tmp_path / "sweep")
    move_pictures(tmp_path / "here", tmp_path / "there")
    assert go_on("there", "0", "1") == 0
    assert table(tmp_path / "sweep")[0] == first and len(table(tmp_path / "sweep")) == 2
    moved = ("--data_root", str(tmp_path / "there"))
    assert compare.main([str(tmp_path / "sweep"), *moved]) == 0, "trials before and after the move are compared"
    for mask in (tmp_path / "there" / "masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(mask)
    capsys.readouterr()
    assert go_on("there", "0", "1") != 0
    assert "the data are not those this sweep began with" in capsys.readouterr().err


def test_a_failed_trial_is_a_row_and_the_next_command_retries_it(swept, tmp_path, monkeypatch, capsys):
    folder, which = Path(shutil.copytree(swept[0], tmp_path / "failing")), ("--fractions", "0.3", "--seeds", "0")
    words = (*which, "--methods", "fixmatch", "mean_teacher", "self_training", "supervised")

    def fails(error: BaseException):
        def method(task):
            raise error

        return method

    with monkeypatch.context() as patch:
        patch.setitem(METHODS._builtin, "fixmatch", fails(UserError("two\nlines")))
        patch.setitem(METHODS._builtin, "mean_teacher", fails(MemoryError("none left")))
        patch.setitem(METHODS._builtin, "self_training", fails(RuntimeError("a bug")))
        assert run_sweep(folder, swept[1], *words) == 1
    rows = {row["method"]: row for row in table(folder)[4:]}
    assert {name: (row["status"], row["error"]) for name, row in rows.items()} == {
        "fixmatch": ("failed", "two lines"),
        "mean_teacher": ("failed", "MemoryError: none left"),
        "self_training": ("failed", "RuntimeError: a bug"),
    }
    assert rows["fixmatch"]["val_dice"] == rows["fixmatch"]["steps"] == ""
    assert {path.parent.name for path in folder.glob("cells/*/error.txt")} == {"unetpp-0.3-0-self_training"}
    assert "failed: fixmatch, unetpp, 0.3 of the labels, seed 0: two lines\n" in capsys.readouterr().err
    assert compare.main([str(folder), "--out", str(tmp_path / "table")]) == 0
    assert "3 of 7 trials" in capsys.readouterr().out
    assert run_sweep(folder, swept[1], *words) == 0
    assert [row["status"] for row in table(folder)] == ["done"] * 7
    assert not list(folder.glob("cells/*/error.txt"))


def test_ctrl_c_leaves_a_complete_table(swept, tmp_path, monkeypatch, capsys):
    words = ("--fractions", "0.3", "--seeds", "0", "--methods", "supervised", "fixmatch")

    def interrupted(task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(METHODS._builtin, "fixmatch", interrupted)
        assert run_sweep(tmp_path / "out", swept[1], *words) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert [row["method"] for row in table(tmp_path / "out")] == ["supervised"]
    assert run_sweep(tmp_path / "out", swept[1], *words) == 0
    assert [row["method"] for row in table(tmp_path / "out")] == ["supervised", "fixmatch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit.steps", "5"], "holds a sweep with fit.steps = 4, this command has 5"),
        (["--data.num_samples", "30"], "holds a sweep with data.num_samples = 24"),
        (["--set", "mining.fit.lr=0.1"], "holds a sweep with set mining.fit.lr = None, this command has '0.1'"),
        (["--methods", "minning"], "methods: unknown name 'minning'; did you mean mining?"),
        (["--models", "unet", "unett"], "unknown name 'unett'; did you mean unet?"),
        (["--fractions", "0.01"], "the smallest that works is 0.0385"),
        (["--fractions", "0.3", "1.5"], "fractions: expected a fraction in (0, 1], got 1.5"),
        (["--fractions", "x"], "fractions: expected float, got 'x'"),
        (["--seeds", "0", "0"], "seeds: expected one or more, each once, got [0, 0]"),
        (["--fractions", "1", "--methods", "mining"], "nothing to do: nothing is unlabeled"),
        (["--set", "mining.fit.steps=9"], "set: fit.steps cannot differ for mining"),
        (["--set", "mining.data.size=64"], "set: data.size cannot differ for mining"),
        (["--set", "mining.fit.lrr=9"], "set: mining, unetpp: unknown setting fit.lrr; did you mean fit.lr?"),
        (["--set", "mining.fit.lr=x"], "set: mining, unetpp: fit.lr: expected float, got 'x'"),
        (["--set", "miming.fit.lr=1"], "set: unknown name 'miming'; did you mean mining?"),
        (["--set", "fit.lr"], "set: expected NAME.SETTING=VALUE"),
        (["--address", "auto"], "address: expected none without --backend ray"),
        (["--processes", "0"], "processes: expected auto or at least 1"),
        (["--device", "gpu"], "device: expected auto, cpu"),
        (["--data.name", "kvasir_seg"], "data.root"),
        (["--set", "mining.segmenter.checkpoint=none.pth"], "none.pth: no such file"),
        (["--set", "mining.segmenter.name=sam_vit_b", "--offline", "true"], "the weights of sam_vit_b are missing"),
    ],
)
def test_settings_that_fail_every_trial_are_refused_before_the_first(
    swept, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))  # a cache without weights
    before = {path: path.stat().st_mtime_ns for path in swept[0].rglob("*.json")}
    usual = {"--fractions": ["0.3"], "--seeds": ["0"], "--methods": ["supervised", "mining"]}
    others = [word for flag, values in usual.items() if flag not in words for word in (flag, *values)]
    try:
        code = run_sweep(*swept[:2], *others, *words)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("kmine sweep: error: ") and message in err and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in swept[0].rglob("*.json")} == before


def test_the_folder_of_a_run_is_refused(swept, tmp_path, capsys):
    run_loop(TINY, tmp_path / "run", swept[1], rounds=0)
    assert run_sweep(tmp_path / "run", swept[1], "--fractions", "0.3") == 2
    assert "holds a run of kmine.loop" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(swept, tmp_path, capsys):
    assert run_sweep(tmp_path / "out", swept[1], *BOTH, "--dry_run") == 0
    err = capsys.readouterr().err
    assert "4 trials, 0 of them done; 2 skipped" in err and "not known yet" in err
    assert "0.3 of the labels: 4 labeled, 9 unlabeled images" in err
    assert "skipped: mining with all labels: nothing is unlabeled" in err
    assert not (tmp_path / "out").exists()


# -- settings


def test_every_setting_has_a_help_text():
    assert {name for name, text in documented("SweepConfig").items() if text} >= SweepConfig.__annotations__.keys()
