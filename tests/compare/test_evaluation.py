"""Costs and rounds of the methods of a run, read from its folder; saved test figures that can be pooled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kmine.compare.evaluation import _can_be_pooled, _cost, _rounds_to_evaluate
from kmine.compare.runs import ComparedRun
from kmine.config import LoopConfig
from kmine.config.sweep import MINING
from kmine.store.run_folder import RunFolder
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0


def compared(root: Path, info: dict, trial: dict | None = None, rounds: int = 2) -> ComparedRun:
    return ComparedRun(root, info, LoopConfig(rounds=rounds), {}, [], trial)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Three rounds of 1, 2 and 4 s; the baseline adopted its first round of 8 s, not its second of 16 s."""
    for folder, seconds in (("round_00", 1), ("round_01", 2), ("round_02", 4)):
        write(tmp_path / folder, {"seconds": {"train": seconds}})
    for number, seconds in ((1, 8), (2, 16)):
        metrics = {"seconds": {"train": seconds}, "adopted": number == 1}
        write(tmp_path / "supervised" / f"round_0{number}", metrics)
    return RunFolder(tmp_path, follows=True)


def write(folder: Path, metrics: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_each_method_is_evaluated_at_its_last_adopted_round(run):
    found = _rounds_to_evaluate(run, compared(run.root, {"adopted_round": 2}))
    assert found == {ROUND_0: (0, ""), EQUAL_STEPS: (1, "supervised"), MINING: (2, "")}
    one_method = {"method": "oracle", "adopted_round": 1, "arm": "oracle"}
    assert _rounds_to_evaluate(run, compared(run.root, one_method)) == {"oracle": (1, "oracle")}


def test_recorded_rounds_take_the_place_of_the_last_adopted_ones(run):
    write(run.root / "supervised_once" / "round_02", {"seconds": {"fit": 40}, "adopted": True})
    info = {"adopted_round": 3, "kept_rounds": {"supervised": 2, "supervised_once": 2}}
    found = _rounds_to_evaluate(run, compared(run.root, info))
    assert found[EQUAL_STEPS] == (2, "supervised") and found[ONE_SCHEDULE] == (2, "supervised_once")
    assert found[MINING] == (3, "")
    assert _cost(compared(run.root, info), run, ONE_SCHEDULE, "supervised_once", 1).seconds == 40, "without round 0"
    without = {"adopted_round": 2, "kept_rounds": {"supervised": 0}}
    assert _rounds_to_evaluate(run, compared(run.root, without))[EQUAL_STEPS] == (0, "")


def test_a_baseline_model_is_evaluated_from_its_own_folder(run):
    for number, seconds in ((0, 32), (1, 64), (2, 128)):
        write(run.root / "unet_labels_only" / f"round_0{number}", {"seconds": {"fit": seconds}, "adopted": number < 2})
    cfg = LoopConfig(rounds=2, baseline_models=("unet", "unetpp"))
    found = _rounds_to_evaluate(run, ComparedRun(run.root, {"adopted_round": 2}, cfg, {}, [], None))
    assert found["unet (labels only)"] == (1, "unet_labels_only") and "unetpp (labels only)" not in found
    cost = _cost(compared(run.root, {}), run, "unet (labels only)", "unet_labels_only", 10)
    assert cost.seconds == 32 + 64 + 128


def test_a_run_without_mining_has_round_0_alone(tmp_path):
    run = RunFolder(tmp_path, follows=True)
    assert _rounds_to_evaluate(run, compared(tmp_path, {"adopted_round": 0}, rounds=0)) == {ROUND_0: (0, "")}


@pytest.mark.parametrize(("method", "seconds"), [(ROUND_0, 1), (EQUAL_STEPS, 1 + 8 + 16), (MINING, 1 + 2 + 4)])
def test_the_seconds_of_a_method_are_the_sum_over_its_rounds(run, method, seconds):
    cost = _cost(compared(run.root, {"peak_memory_mb": 300}), run, method, "", 1000)
    assert (cost.seconds, cost.num_parameters) == (seconds, 1000)
    assert cost.peak_memory_mb == 300 if method == MINING else np.isnan(cost.peak_memory_mb)


def test_a_round_without_metrics_leaves_the_seconds_unknown(run):
    (run.root / "round_02" / "metrics.json").unlink()
    assert np.isnan(_cost(compared(run.root, {}), run, MINING, "", None).seconds)


def test_costs_of_a_trial_are_those_the_sweep_measured(run):
    trial = {"seconds": "12.5", "peak_memory_mb": "many", "num_parameters": ""}
    cost = _cost(compared(run.root, {}, trial), run, "oracle", "", 1000)
    assert (cost.seconds, cost.num_parameters) == (12.5, 1000) and np.isnan(cost.peak_memory_mb)


@pytest.mark.parametrize(
    ("case", "fits"),
    [
        ({"sample_id": "picture"}, True),
        ({"sample_id": "v/slice-0001"}, False),
        ({"sample_id": "v/slice-0001", "counts": [[1, 2, 3]]}, True),
    ],
)
def test_slices_need_pixel_counts_to_be_pooled(case, fits):
    assert _can_be_pooled({"mining": {"chosen": {"cases": [case]}}}) is fits
