"""compare: opens the test split, says so, and compares what belongs together."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from kmine import compare, loop
from kmine.compare import BASELINE, MINING, ROUND_0, markdown

TINY = {
    "segmenter.name": "ellipse",
    "rounds": 1,
    "data.num_samples": 24,
    "data.size": 32,
    "data.label_fraction": 0.3,
    "data.val_fraction": 0.2,
    "model.encoder": "tu-mobilenetv3_small_050",
    "model.encoder_depth": 3,
    "model.decoder_channels": 8,
    "fit.steps": 8,
    "fit.round_steps": 4,
    "fit.batch_size": 2,
    "fit.val_every": 4,
    "infer.tta": "none",
    "gate.min_agreement": 0,
    "gate.min_jitter_dice": 0,
    "gate.min_confidence": 0,
    "gate.max_confidence_outside": 1,
    "gate.max_area_ratio": 1000,
    "refine.ask_local": "false",
}


def run(folder: Path, cache: Path, **more: object) -> str:
    settings = TINY | {"out": folder, "data.cache_dir": cache} | {k.replace("__", "."): v for k, v in more.items()}
    assert loop.main([f"--{name}={value}" for name, value in settings.items()]) == 0
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


def test_the_table_has_the_three_arms_on_the_test_split_and_the_opening_is_logged(two_runs, capsys):
    capsys.readouterr()
    assert compare.main(two_runs) == 0
    shown = capsys.readouterr().out
    assert "6 images, 2 seed(s), segmenter ellipse" in shown
    assert shown.count("\n| ") == 4 and "mining (ellipse)" in shown
    for folder in two_runs:
        assert len(opened(folder)) == 1
    rows = table(two_runs[0], "test_cases.csv")
    test_ids = {r["sample_id"] for r in table(two_runs[0], "splits.csv") if r["split"] == "test"}
    assert {r["sample_id"] for r in rows} == test_ids
    assert {(r["arm"], r["checkpoint"]) for r in rows} == {
        (arm, checkpoint) for arm in (ROUND_0, BASELINE, MINING) for checkpoint in ("chosen", "final")
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


def arm(dice: list[float]) -> dict:
    cases = [{"sample_id": str(i), "dice": d, "iou": d, "hd95": 1.0, "num_missed": 0} for i, d in enumerate(dice)]
    one = {"dice": float(np.mean(dice)), "iou": 0.5, "hd95": 1.0, "num_missed": 0, "cases": cases}
    return {"chosen": one, "final": one}


def test_a_gap_within_the_noise_is_called_no_difference():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.9, 40)
    clear = [{ROUND_0: arm(base - 0.2), BASELINE: arm(base), MINING: arm(base + 0.05)}]
    noisy = [{ROUND_0: arm(base - 0.2), BASELINE: arm(base), MINING: arm(base + rng.normal(0, 0.2, 40))}]
    assert "+0.050 [+0.050, +0.050] |" in markdown(clear, "ellipse")
    assert "no difference shown" in markdown(noisy, "ellipse").splitlines()[-1]
    assert "-0.200" in markdown(clear, "ellipse")
