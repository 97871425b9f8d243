"""Trials in several processes: GPUs, waiting, crashes; the table equals that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.sweep_command import (
    A0,
    A1,
    B0,
    B1,
    MEASURED,
    one_thread,
    record_state,
    run_sweep,
    session,
    settings,
    sweep_words,
    table,
)

from kmine.store.run_folder import RunFolder
from kmine.sweep import workers
from kmine.sweep.trials import trial_dir

WORDS = ("--fractions", "0.3", "--seeds", "0", "1", "--methods", "supervised")
TIMEOUT = 300
"""Seconds; the machine may be busy."""


@pytest.mark.parametrize(
    ("is_gpu", "cores", "ram_gb", "device", "expected"),
    [
        (True, 2, 8, "auto", 3), (True, 2, 8, "cuda:1", 1), (False, 16, 64, "auto", 8), (False, 16, 13, "cpu", 3),
        (False, 1, 1, "auto", 1),
    ],
)  # fmt: skip
def test_auto_is_a_worker_a_gpu_or_two_cores_as_memory_allows(is_gpu, cores, ram_gb, device, expected, monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1", "2"])
    machine = SimpleNamespace(is_gpu=is_gpu, cores=cores, ram_gb=ram_gb)
    assert workers.auto_processes(machine, device) == expected


def test_a_trial_of_another_command_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    held, lines = RunFolder(trial_dir(tmp_path, A0)), []

    def other() -> None:
        time.sleep(0.1)
        record_state(tmp_path, A0, "done")
        held.close()

    thread = threading.Thread(target=other)
    thread.start()
    workers.work(session(tmp_path, A0), terminal=SimpleNamespace(log=lines.append))
    thread.join()
    assert lines == ["1 trials are running in another process; waiting"]


@pytest.mark.parametrize(
    ("exitcode", "text"),
    [(-9, "its process was killed (SIGKILL): out of memory?"), (3, "its process ended with exit code 3")],
)
def test_an_exit_code_becomes_text(exitcode, text):
    assert workers.ended_by(exitcode) == text


def test_workers_are_spread_over_the_gpus(tmp_path, monkeypatch):
    environments = []

    class Worker:
        sentinel, exitcode = 0, 0

        def __init__(self, **settings: object) -> None: ...

        def start(self) -> None:
            environments.append((os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]))

        def is_alive(self) -> bool:
            return False

        def join(self) -> None: ...

    def begin(device: str) -> list[tuple[str | None, str]]:
        environments.clear()
        cfg = settings(tmp_path, tmp_path, "--processes", "3", "--device", device)
        workers.work_in_processes(replace(session(tmp_path, A0, A1, B0, B1), cfg=cfg), SimpleNamespace(log=print))
        return list(environments)

    context = SimpleNamespace(Process=Worker)
    monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(workers, "wait", lambda *_, **__: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert begin("auto") == [("4", "2"), ("7", "2"), ("4", "2")]
    assert begin("cpu") == [("4, 7", "2")] * 3, "no GPU is used"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert begin("auto") == [("", "2")] * 3
    assert os.environ["OMP_NUM_THREADS"] == "6", "the environment of this process is unchanged"


def test_a_worker_uses_the_gpu_with_the_fewest_workers():
    assert workers.least_used(["0", "1", "2"], ["0", "2", "0"]) == "1"
    assert workers.least_used(["0", "1"], ["1", "0"]) == "0" and workers.least_used([], [None]) is None


# -- processes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[tuple[list[dict[str, str]], Path]]:
    """Rows of the sweep in one process, without measured columns, and the cache."""
    base = tmp_path_factory.mktemp("processes")
    with one_thread():
        assert run_sweep(base / "out", base / "cache", *WORDS) == 0
        yield table(base / "out", MEASURED), base / "cache"


def wait_for(found: Callable[[], object]) -> object:
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.05)
    raise TimeoutError


def running_processes(out: Path) -> list[int]:
    """Processes of the running trials."""
    states = [json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")]
    return [state["pid"] for state in states if state["status"] == "running"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_worker_fails_one_trial_which_the_next_command_retries(undisturbed, tmp_path, capsys):
    (rows, cache), out = undisturbed, tmp_path / "out"
    words = ("--fractions", "0.3", "--seeds", "0", "--methods", "supervised", "--processes", "2")
    kill = lambda: os.kill(wait_for(lambda: running_processes(out))[0], signal.SIGKILL)  # noqa: E731
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run_sweep(out, cache, *words) == 1
    killer.join()
    (row,) = table(out)
    assert (row["status"], row["error"]) == ("failed", "its process was killed (SIGKILL): out of memory?")
    assert "the same command retries the failed trials" in capsys.readouterr().err
    assert run_sweep(out, cache, *words[:-2]) == 0
    assert table(out, MEASURED) == rows[:1]


@pytest.mark.slow
def test_a_killed_sweep_of_two_workers_leaves_no_process_and_resumes(undisturbed, tmp_path):
    (rows, cache), out = undisturbed, tmp_path / "out"
    command = [sys.executable, "-m", "kmine.sweep", *sweep_words(out, cache, *WORDS, "--processes", "2")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
        wait_for(lambda: list(out.glob("cells/*/round_00/model.safetensors")) or process.poll() is not None)
        pids = running_processes(out)
        process.kill()
        process.wait()
    assert pids, (tmp_path / "log").read_text()
    wait_for(lambda: not any(map(is_alive, pids)))
    assert len(table(out)) < len(rows)
    assert run_sweep(out, cache, *WORDS) == 0
    assert table(out, MEASURED) == rows
