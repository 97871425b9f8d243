"""A sweep in several processes, on a Ray cluster, and killed: the table is that of one process left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.sweep_command import (
    MEASURED,
    run_sweep,
    sweep_words,
    table,
)

pytestmark = pytest.mark.slow
WORDS = ("--fractions", "0.3", "--seeds", "0", "1", "--methods", "supervised")
PATIENCE = 300
"""Seconds after which a test gives up; a machine may be busy."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process: another one changes a training's last digits, and so its end."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(one_thread, tmp_path_factory) -> tuple[list[dict[str, str]], Path]:
    """Rows of the sweep in one process, without what was measured, and the cache."""
    base = tmp_path_factory.mktemp("processes")
    assert run_sweep(base / "out", base / "cache", *WORDS) == 0
    return table(base / "out", MEASURED), base / "cache"


def wait_for(found: Callable[[], object]) -> object:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.05)
    raise TimeoutError


def at_work(out: Path) -> list[int]:
    """Processes that cells say they are run by."""
    states = [json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")]
    return [state["pid"] for state in states if state["status"] == "running"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_costs_its_cell_and_no_more(undisturbed, tmp_path, capsys):
    rows, cache = undisturbed
    words = ("--fractions", "0.3", "--seeds", "0", "--methods", "supervised", "--processes", "2")
    killer = threading.Thread(
        target=lambda: os.kill(wait_for(lambda: at_work(tmp_path / "out"))[0], signal.SIGKILL), daemon=True
    )
    killer.start()
    assert run_sweep(tmp_path / "out", cache, *words) == 1
    killer.join()
    assert [(row["status"], row["error"]) for row in table(tmp_path / "out")] == [
        ("failed", "its process was killed (SIGKILL): out of memory?")
    ]
    assert "the same command retries the failed trials" in capsys.readouterr().err
    assert run_sweep(tmp_path / "out", cache, *words[:-2]) == 0
    assert table(tmp_path / "out", MEASURED) == rows[:1]


def test_a_sweep_of_two_workers_that_is_killed_leaves_no_orphan_and_goes_on(undisturbed, tmp_path):
    rows, cache = undisturbed
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kmine.sweep", *sweep_words(out, cache, *WORDS, "--processes", "2")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
        wait_for(lambda: list(out.glob("cells/*/round_00/model.safetensors")) or process.poll() is not None)
        workers = at_work(out)
        process.kill()
        process.wait()
    assert workers, (tmp_path / "log").read_text()
    wait_for(lambda: not any(map(is_alive, workers)))
    assert len(table(out)) < len(rows)
    assert run_sweep(out, cache, *WORDS) == 0
    assert table(out, MEASURED) == rows


def test_two_workers_of_a_ray_cluster_come_to_the_same_table(undisturbed, tmp_path):
    ray = pytest.importorskip("ray")
    rows, cache = undisturbed
    assert run_sweep(tmp_path / "out", cache, *WORDS, "--backend", "ray", "--processes", "2") == 0
    assert table(tmp_path / "out", MEASURED) == rows
    assert not ray.is_initialized()
    logs = [path.read_text() for path in (tmp_path / "out").glob("cells/*/log.txt")]
    assert len(logs) == len(rows) and any("round 0: training" in log for log in logs)


def test_no_cluster_at_the_address_is_one_line(tmp_path, capsys):
    pytest.importorskip("ray")
    code = run_sweep(tmp_path / "out", tmp_path / "cache", *WORDS, "--backend", "ray", "--address", "127.0.0.1:1")
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and err.startswith("kmine sweep: error: address: expected a Ray cluster at 127.0.0.1:1")
