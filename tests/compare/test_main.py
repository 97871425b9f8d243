"""compare: opens the test split, says so, and compares what belongs together."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.loop_command import OPEN_GATE, SMALL, run_loop

from kmine.compare import __main__ as compare
from kmine.config.sweep import MINING
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0

TINY = {
    **SMALL,
    **OPEN_GATE,
    "baseline": "true",
    "fit.steps": 8,
    "fit.round_steps": 4,
    "fit.val_every": 4,
    "refine.ask_local": "false",
}


def run(folder: Path, cache: Path, **more: object) -> str:
    assert run_loop(TINY, folder, cache, **more) == 0
    return str(folder)


def opened(folder: str) -> list[str]:
    return json.loads((Path(folder) / "run.json").read_text())["test_opened"]


def table(folder: str, name: str) -> list[dict[str, str]]:
    with (Path(folder) / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> list[str]:
    base = tmp_path_factory.mktemp("compare")
    return [run(base / f"seed{s}", base / "cache", seed=s) for s in (0, 1)]


def test_the_table_has_the_four_arms_on_the_test_split_and_the_opening_is_logged(two_runs, capsys):
    capsys.readouterr()
    assert compare.main(two_runs) == 0
    shown = capsys.readouterr().out
    assert "6 images, 2 seed(s), segmenter ellipse" in shown
    assert shown.count("\n| ") == 5 and "mining (ellipse)" in shown
    for folder in two_runs:
        assert len(opened(folder)) == 1
    rows = table(two_runs[0], "test_cases.csv")
    test_ids = {r["sample_id"] for r in table(two_runs[0], "splits.csv") if r["split"] == "test"}
    assert {r["sample_id"] for r in rows} == test_ids
    assert {(r["arm"], r["checkpoint"]) for r in rows} == {
        (arm, checkpoint) for arm in (ROUND_0, EQUAL_STEPS, ONE_SCHEDULE, MINING) for checkpoint in ("chosen", "final")
    }


def test_a_second_look_reads_what_the_first_one_wrote(two_runs, capsys):
    compare.main(two_runs[:1])
    first = capsys.readouterr().out
    compare.main(two_runs[:1])
    assert capsys.readouterr().out == first
    assert len(opened(two_runs[0])) == 1


def test_runs_on_other_data_are_not_mixed(two_runs, tmp_path, capsys):
    other = run(tmp_path / "other", tmp_path / "cache", data__kind="ct")
    assert compare.main([two_runs[0], other]) == 2
    assert "differ in data" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, '{"stopped_by": "interrupted"}'])
def test_what_is_no_finished_run_is_one_clear_error(tmp_path, capsys, content):
    if content:
        (tmp_path / "run.json").write_text(content)
        (tmp_path / "config.yaml").write_text("rounds: 1\n")
    assert compare.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("not finished" in err if content else "expected a run folder" in err)


def test_the_table_is_written_in_every_format(two_runs, tmp_path, capsys):
    assert compare.main([*two_runs, "--out", str(tmp_path), "--baseline", ROUND_0]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "test_table.md").read_text() == shown and f"*{ROUND_0}*" in shown
    rows = table(str(tmp_path), "test_table.csv")
    assert [row["method"] for row in rows] == [ROUND_0, EQUAL_STEPS, ONE_SCHEDULE, "mining (ellipse)"]
    assert [row["is_baseline"] for row in rows] == ["True", "False", "False", "False"]
    assert all(float(row["seconds"]) > 0 and float(row["num_parameters"]) > 1e4 for row in rows)
    assert float(rows[3]["seconds"]) > float(rows[0]["seconds"])
    assert "\\toprule" in (tmp_path / "test_table.tex").read_text()
    assert '<th scope="row">mining (ellipse)</th>' in (tmp_path / "test_table.html").read_text()
    assert compare.main([two_runs[0], "--out", str(tmp_path / "few"), "--format", "markdown"]) == 0
    assert not list((tmp_path / "few").glob("*.tex")) and (tmp_path / "few" / "test_table.md").is_file()
    assert compare.main([two_runs[0], "--baseline", "mimning"]) == 2
    assert "did you mean mining?" in capsys.readouterr().err


def copied(source: str, folder: Path, **fields: object) -> Path:
    """A run folder once more, with other fields of run.json; the test split was never opened there."""
    shutil.copytree(source, folder)
    (folder / "test_metrics.json").unlink(missing_ok=True)
    run = json.loads((folder / "run.json").read_text()) | fields
    (folder / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k != "test_opened"}))
    return folder


def sweep(folder: Path, rows: list[dict[str, object]]) -> str:
    folder.mkdir(exist_ok=True)
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, SWEEP)
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


SWEEP = "method model label_fraction seed status error run num_labeled num_unlabeled steps val_dice val_dice_final"
SWEEP = [*SWEEP.split(), "seconds", "peak_memory_mb", "num_parameters"]


def cell(method: str, run: str, **more: object) -> dict[str, object]:
    row = {"method": method, "model": "unetpp", "label_fraction": 0.3, "seed": 0, "status": "done", "run": run}
    return row | {"seconds": 12.5, "peak_memory_mb": 321, "num_parameters": 1000} | more


def test_a_sweep_is_a_table_of_its_finished_cells(two_runs, tmp_path, capsys):
    one = copied(two_runs[0], tmp_path / "cells" / "a", method="supervised", adopted_round=0, arm="")
    two = copied(two_runs[0], tmp_path / "cells" / "b", method="mean_teacher", adopted_round=1, arm="supervised")
    for other in ("round_00", "round_01"):
        shutil.rmtree(two / other)  # its result is said to be in supervised/round_01, and nowhere else
    rows = [
        cell("supervised", "cells/a"),
        cell("mean_teacher", "cells/b", seconds=""),
        cell("fixmatch", "cells/c", status="failed", error="out of memory"),
    ]
    folder = sweep(tmp_path, rows)
    assert compare.main([folder]) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 trials" in shown and "*supervised*" in shown and "fixmatch" not in shown.replace("1 of 3", "")
    supervised, teacher = table(folder, "test_table.csv")
    assert (supervised["seconds"], supervised["peak_memory_mb"], teacher["seconds"]) == ("12.5", "321.0", "")
    assert len(opened(str(one))) == len(opened(str(two))) == 1
    compare.main([two_runs[0]])
    first, other, whole = (figures(where) for where in (one, two, Path(two_runs[0])))
    assert first == {"supervised": whole[ROUND_0]} and other["mean_teacher"] != whole[ROUND_0]
    with (tmp_path / "test_cases.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"supervised", "mean_teacher"}


def figures(folder: Path) -> dict:
    return json.loads((folder / "test_metrics.json").read_text())["arms"]


def test_what_is_wrong_with_a_sweep_is_one_clear_error(two_runs, tmp_path, capsys):
    copied(two_runs[0], tmp_path / "a", method="mining")
    for rows, said in (
        ([cell("mining", "a", status="failed")], "none of the 1 trials of sweep.csv is done"),
        ([cell("supervised", "a")], "expected a run of supervised, as sweep.csv says; run.json says mining"),
        ([cell("mining", "b")], "expected a run folder"),
        ([cell("mining", "a", seed="x")], "sweep.csv: expected numbers for label_fraction and seed"),
    ):
        assert compare.main([sweep(tmp_path, rows)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert "test_opened" not in (tmp_path / "a" / "run.json").read_text(), "all of this is seen before"
    (tmp_path / "sweep.csv").write_text("method,seed\nmining,0\n")
    assert compare.main([str(tmp_path)]) == 2
    assert "model is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("splits.csv", ",test", ",val", "differ in test split"),
        ("config.yaml", "rounds: 1", "rounds: 2", "differ in rounds (1 and 2)"),
        ("config.yaml", "batch_size: 2", "batch_size: 4", "differ in fit.batch_size (2 and 4)"),
    ],
)
def test_what_differs_is_named_before_any_test_split_is_opened(two_runs, tmp_path, capsys, name, old, new, said):
    runs = [copied(run, tmp_path / f"seed{n}") for n, run in enumerate(two_runs)]
    text = (runs[1] / name).read_text()
    assert old in text
    (runs[1] / name).write_text(text.replace(old, new, 1))
    assert compare.main([str(run) for run in runs]) == 2
    assert said in capsys.readouterr().err
    assert not [run for run in runs if "test_opened" in (run / "run.json").read_text()]


def test_the_same_seed_twice_is_refused(two_runs, tmp_path, capsys):
    again = shutil.copytree(two_runs[0], tmp_path / "again")
    assert compare.main([two_runs[0], str(again)]) == 2
    assert "both hold supervised, round 0" in capsys.readouterr().err


def test_figures_written_before_counts_were_kept_are_read(two_runs, tmp_path, capsys):
    compare.main([two_runs[0]])
    old = Path(shutil.copytree(two_runs[0], tmp_path / "old"))
    saved = json.loads((old / "test_metrics.json").read_text())
    del saved["check"]
    del saved["num_parameters"]
    for case in (c for a in saved["arms"].values() for metrics in a.values() for c in metrics["cases"]):
        del case["counts"]
    (old / "test_metrics.json").write_text(json.dumps(saved))
    capsys.readouterr()
    assert compare.main([str(old)]) == 0
    assert len(opened(str(old))) == len(opened(two_runs[0])), "read, not computed anew"
