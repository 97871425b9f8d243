"""Trials on a Ray cluster: order, locked trials, crashes; with ray installed, a cluster of two workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.sweep_command import A0, A1, B0, B1, MEASURED, one_thread, record_state, run_sweep, session, table

from kmine.store.run_folder import RunFolder
from kmine.sweep.ray_backend import BUSY, _outcome, interleave, run_remote_trial
from kmine.sweep.trials import state_of, trial_dir

WORDS = ("--fractions", "0.3", "--seeds", "0", "1", "--methods", "supervised")


def test_first_trials_of_all_siblings_come_first():
    assert interleave([A0, A1, B0, B1]) == [A0, B0, A1, B1]


def test_a_task_leaves_a_locked_or_finished_trial(tmp_path):
    command = session(tmp_path, A0)
    held = RunFolder(trial_dir(tmp_path, A0))
    assert run_remote_trial(command, A0, str(Path.cwd())) == BUSY
    held.close()
    record_state(tmp_path, A0, "done")
    assert run_remote_trial(command, A0, str(Path.cwd())) == "done"


def test_a_crashed_task_is_a_failed_trial(tmp_path):
    class RayError(Exception):
        cause = None

    def get(done: object) -> str:
        raise RayError("The worker died unexpectedly.\nmore")

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayError=RayError))
    assert _outcome(ray, None, session(tmp_path, A0), A0) == "failed"
    assert state_of(tmp_path, A0)["error"] == "RayError: The worker died unexpectedly."


@pytest.mark.slow
def test_two_workers_of_a_cluster_make_the_table_of_one_process(tmp_path):
    ray, cache = pytest.importorskip("ray"), tmp_path / "cache"
    with one_thread():
        assert run_sweep(tmp_path / "ray", cache, *WORDS, "--backend", "ray", "--processes", "2") == 0
        assert run_sweep(tmp_path / "one", cache, *WORDS) == 0
    assert not ray.is_initialized()
    assert table(tmp_path / "ray", MEASURED) == table(tmp_path / "one", MEASURED)
    logs = [path.read_text() for path in (tmp_path / "ray").glob("cells/*/log.txt")]
    assert len(logs) == 2 and any("round 0: training" in log for log in logs)


@pytest.mark.slow
def test_no_cluster_at_the_address_is_one_line(tmp_path, capsys):
    pytest.importorskip("ray")
    code = run_sweep(tmp_path / "out", tmp_path / "cache", *WORDS, "--backend", "ray", "--address", "127.0.0.1:1")
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and err.startswith("kmine sweep: error: address: expected a Ray cluster at 127.0.0.1:1")
