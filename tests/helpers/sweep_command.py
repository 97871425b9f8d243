"""`kmine sweep` on a phantom small enough for a test, and its table."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, words

from kmine import cli
from kmine.config.sweep import SweepConfig
from kmine.io.files import write_json
from kmine.sweep import __main__ as sweep
from kmine.sweep.trials import Session, Trial, trial_dir

TINY = {**SMALL, **OPEN_GATE, **FEW_STEPS}
MEASURED = ("seconds", "peak_memory_mb")
"""Columns that differ between two sweeps of the same trials."""
A0, A1, B0, B1 = (Trial(m, "unetpp", f, 0) for f in (0.1, 0.2) for m in ("supervised", "mining"))
"""Two trials that share round 0, and two others."""


def sweep_words(out: Path, cache: Path, *more: str, **changes: object) -> list[str]:
    return [*words(TINY, out, cache, **changes), *more]


def run_sweep(out: Path, cache: Path, *more: str, **changes: object) -> int:
    return sweep.main(sweep_words(out, cache, *more, **changes))


def settings(out: Path, cache: Path, *more: str, **changes: object) -> SweepConfig:
    return cli.parse(SweepConfig, sweep_words(out, cache, *more, **changes), prog="kmine sweep", description="words")


def table(folder: Path, without: Sequence[str] = ()) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def session(out: Path, *trials: Trial, since: float = 0.0) -> Session:
    """A command for these trials; nothing is trained or read."""
    return Session(SweepConfig(out=str(out)), trials, trials, since)


def record_state(out: Path, trial: Trial, status: str, **more: object) -> None:
    write_json(trial_dir(out, trial) / "cell.json", {**vars(trial), "status": status, **more})


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread here and in child processes: another number changes the last digits of a training."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
