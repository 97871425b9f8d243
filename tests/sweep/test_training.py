"""Training of a trial: steps, shared artifacts, and states of failed trials."""

from __future__ import annotations

from types import SimpleNamespace

from helpers.sweep_command import run_sweep, table

from kmine.sweep.training import link_shared_artifacts, num_steps
from kmine.types import Metrics, RoundResult


def test_rounds_without_pseudo_masks_take_no_steps():
    metrics = Metrics((), 0.5, 0.5, 0.0, 0, 0)
    rounds = [RoundResult(n, 4, pseudo, metrics, metrics, True, {}) for n, pseudo in ((0, 0), (1, 3), (2, 0))]
    task = SimpleNamespace(cfg=SimpleNamespace(rounds=3, fit=SimpleNamespace(steps=100, round_steps=10)))
    assert num_steps(task, rounds, by_pseudo_masks=True) == 110
    assert num_steps(task, rounds, by_pseudo_masks=False) == 120, "supervised training has no pseudo masks"
    assert num_steps(task, rounds[:1], by_pseudo_masks=True) == 100
    once = RoundResult(3, 4, 3, metrics, metrics, True, {}, retrained=True)
    assert num_steps(task, [*rounds, once], by_pseudo_masks=True) == 110, "those of the rounds, which it has too"
    assert num_steps(task, [once], by_pseudo_masks=False) == 130, "one schedule in place of three rounds"


def test_shared_artifacts_are_linked_unless_the_target_exists(tmp_path):
    for name in ("round_00/model.safetensors", "round_00/fit_state.safetensors", "round_00/.x.kmine-tmp", "round_01/a"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text("a")
    (tmp_path / "a" / "fold_1" / "round_00").mkdir(parents=True)
    (tmp_path / "a" / "fold_1" / "round_00" / "metrics.json").write_text("a")
    (tmp_path / "b" / "round_00").mkdir(parents=True)
    (tmp_path / "b" / "round_00" / "model.safetensors").write_text("b")
    link_shared_artifacts(tmp_path / "a", tmp_path / "b")
    found = {
        p.relative_to(tmp_path / "b").as_posix(): p.read_text() for p in (tmp_path / "b").rglob("*") if p.is_file()
    }
    assert found == {"round_00/model.safetensors": "b", "fold_1/round_00/metrics.json": "a"}


def test_trials_with_a_split_file_share_round_0(tmp_path):
    rows = [f"polyp_{n:06},{('train', 'train', 'val', 'test')[n % 4]}" for n in range(24)]
    (tmp_path / "given.csv").write_text("\n".join(["sample_id,split", *rows]))
    words = ("--fractions", "0.5", "--seeds", "0", "--methods", "supervised", "mean_teacher")
    split_file = {"data__split_file": tmp_path / "given.csv"}
    assert run_sweep(tmp_path / "out", tmp_path / "cache", *words, **split_file) == 0
    assert [row["status"] for row in table(tmp_path / "out")] == ["done", "done"]
    weights = (tmp_path / "out").glob("cells/*/round_00/model.safetensors")
    assert len({path.stat().st_ino for path in weights}) == 1
    for trial in (tmp_path / "out" / "cells").iterdir():
        rounds = [line.split(",")[:2] for line in (trial / "history.csv").read_text().splitlines()]
        assert ["mining", "0"] in rounds and len(rounds) > 2, "of round 0 also where it was shared"
        assert (trial / "curves.svg").read_text().startswith("<svg") and "training" in (trial / "log.txt").read_text()
