"""Fields of run.json on the origin and the cost of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.small import CFG

from kmine.data import open_source
from kmine.setup import provenance as origin
from kmine.setup.provenance import PACKAGES, count_parameters, git_commit, peak_memory_mb, preparing, provenance
from kmine.store.run_folder import RunFolder


def test_run_json_records_versions_seed_and_numbers_of_images(task_of, monkeypatch):
    cfg = replace(CFG, rounds=0, seed=3, device="cpu")
    task, _ = task_of(cfg)
    monkeypatch.setattr(sys, "argv", ["/bin/kmine", "loop", "--seed", "3"])
    fields = provenance(cfg, task, open_source(cfg.data), {"images": "x"})
    assert (fields["command"], fields["seed"], fields["dataset"]) == ("kmine loop --seed 3", 3, "phantom")
    assert fields["segmenter"] == fields["segmenter_sha256"] == "none"
    assert tuple(fields["versions"]) == PACKAGES and fields["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert fields["splits"] == {"labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "val": len(task.val)}
    assert fields["precision"] in ("32", "bf16")
    assert fields["data_contents"] == {"images": "x"} and fields["class_names"] == ["background", "polyp"]
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "run.py", "a"])
    assert provenance(cfg, task, open_source(cfg.data), {})["command"] == "python run.py a"


def test_a_package_that_is_absent_is_recorded_as_not_installed():
    assert origin._version("no-such-package-of-kmine") == "not installed"


@pytest.mark.parametrize(("status", "commit"), [("", "abc"), (" M kmine/cli.py\n", "abc+")])
def test_the_commit_carries_a_plus_if_files_differ(monkeypatch, status, commit):
    outputs = {"rev-parse": "abc\n", "status": status}
    monkeypatch.setattr(subprocess, "run", lambda words, **_: SimpleNamespace(stdout=outputs[words[3]]))
    assert git_commit() == commit


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_outside_a_checkout_the_commit_is_none(monkeypatch, error):
    def run(*args, **more):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert git_commit() == "none"


def test_parameters_are_those_of_the_local_model():
    task = SimpleNamespace(cfg=CFG, num_classes=2)
    num_parameters = count_parameters(task)
    assert count_parameters(SimpleNamespace(cfg=CFG, num_classes=3)) > num_parameters > 10_000


def test_seconds_of_preparation_add_up_without_those_of_trainings(tmp_path):
    run = RunFolder(tmp_path)
    run.update_run(preparation_seconds=5.0)
    with preparing(run):
        time.sleep(0.2)
    assert 5.2 <= run.run()["preparation_seconds"] < 9
    before = run.run()["preparation_seconds"]
    with preparing(run):
        run.save_tensors(
            tmp_path / "round_00" / "model.safetensors", {"w": torch.zeros(1)}, "signature", seconds=1000.0
        )
    assert run.run()["preparation_seconds"] == before, "the training records its own seconds"
    with pytest.raises(KeyboardInterrupt), preparing(run):
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert run.run()["preparation_seconds"] == before, "an interrupted session does not count"
    run.close()


def test_peak_memory_is_in_megabytes():
    assert 10 < peak_memory_mb() < 1_000_000
