"""Cells one after another in this process, or in several: each takes the next cell that nobody is at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from kmine import cli
from kmine.config.sweep import SweepConfig
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.setup.preflight import preflight
from kmine.sweep.plan import time_left, write_table
from kmine.sweep.trials import (
    Trial,
    TrialLog,
    claim_next,
    config_of,
    is_finished,
    record_crash,
    run_trial,
    state_of,
)

POLL_SECONDS = 2.0
"""Seconds between two looks at cells that another command is at."""


def work(
    cfg: SweepConfig,
    trials: Sequence[Trial],
    table_trials: Sequence[Trial],
    since: float,
    terminal: cli.Terminal,
    source: Source,
) -> None:
    """Do in this process what is left of `trials`; cells that another process is at are waited for.

    Args:
        cfg: of the sweep.
        trials: what is to be done.
        table_trials: all cells of the table.
        since: when the command began, seconds of the epoch: what failed later is not tried again.
        terminal: shows the plan's progress and the rounds'.
        source: the data set.
    """
    waiting = False
    while remaining := [trial for trial in trials if not is_finished(state_of(cfg.out, trial), since)]:
        claimed = claim_next(cfg.out, trials, since)
        if claimed is None:
            if not waiting:
                terminal.log(f"{len(remaining)} cells are in the hands of another process; waiting for it")
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        waiting, (trial, store) = False, claimed
        states = {other: state_of(cfg.out, other) for other in trials}
        terminal.log(
            f"cell {len(trials) - len(remaining) + 1} of {len(trials)}: {trial}; time to go: "
            f"{time_left(trials, states, since, 1)}"
        )
        try:
            state = run_trial(cfg, trial, siblings(trial, table_trials), store, source, terminal)
        finally:
            terminal.stop()
            store.close()
        write_table(cfg.out, table_trials)
        terminal.log(f"{trial}: {outcome(state)}")


def siblings(trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
    """The others with the same round 0."""
    return [other for other in trials if other.share_key == trial.share_key and other != trial]


def outcome(state: dict[str, Any]) -> str:
    """How a cell ended, in words."""
    if state.get("status") != "done":
        return f"failed: {state.get('error', 'unknown')}"
    dice = state.get("val_dice")
    return f"validation Dice {'unknown' if dice is None else f'{dice:.3f}'}, {state['took']:.0f} s"


# -- several processes


def work_in_processes(
    cfg: SweepConfig, trials: Sequence[Trial], table_trials: Sequence[Trial], since: float, terminal: cli.Terminal
) -> None:
    """The same in `cfg.processes` workers; one that crashes costs its cell, and another takes its place.

    Where there are several GPUs, and none is named, the workers are dealt out among them.
    """
    context = multiprocessing.get_context("spawn")
    count = min(cfg.processes, len(trials))
    gpus = visible_gpus() if cfg.device in ("auto", "cuda") else []
    workers: dict[Any, str | None] = {}

    def begin() -> None:
        gpu = least_used(gpus, list(workers.values()))
        surroundings = {"OMP_NUM_THREADS": str(max(1, _all_threads() // count))}
        with _environment(surroundings | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})):
            worker = context.Process(target=_worker, args=(cfg, list(trials), list(table_trials), since))
            worker.start()
        workers[worker] = gpu

    finished: set[Trial] = {trial for trial in trials if is_finished(state_of(cfg.out, trial), since)}
    try:
        for _ in range(count):
            begin()
        while workers:
            wait([worker.sentinel for worker in workers], timeout=1)
            for worker in [worker for worker in workers if not worker.is_alive()]:
                del workers[worker]
                if worker.exitcode and _crashed(cfg, trials, table_trials, worker):
                    begin()
            finished = report_finished(cfg, trials, since, terminal, finished, count)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _crashed(cfg: SweepConfig, trials: Sequence[Trial], table_trials: Sequence[Trial], worker: Any) -> bool:
    """Book the death of a worker on the cell that it was at; whether to begin another.

    Raises:
        UserError: it was at none, so the next would fare no better.
    """
    trial = record_crash(cfg.out, trials, worker.pid, ended_by(worker.exitcode))
    if trial is None:
        raise UserError(f"a worker ended before it began a cell ({ended_by(worker.exitcode)}); try --processes 1")
    write_table(cfg.out, table_trials)
    return True


def ended_by(exitcode: int) -> str:
    """How a process came to its end, in words."""
    if exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"its process was killed ({name})" + (": out of memory?" if name == "SIGKILL" else "")


def report_finished(
    cfg: SweepConfig,
    trials: Sequence[Trial],
    since: float,
    terminal: cli.Terminal,
    finished: set[Trial],
    processes: int,
) -> set[Trial]:
    """Say which cells came to an end since `finished` did; all that have by now."""
    states = {trial: state_of(cfg.out, trial) for trial in trials}
    ended = {trial for trial in trials if is_finished(states[trial], since)}
    for trial in trials:
        if trial in ended - finished:
            terminal.log(
                f"{trial}: {outcome(states[trial])}; {len(ended)} of {len(trials)} cells, time to go: "
                f"{time_left(trials, states, since, processes)}"
            )
    return ended


def _worker(cfg: SweepConfig, trials: list[Trial], table_trials: list[Trial], since: float) -> None:
    """One process: cells as long as there are any. Ctrl-C is the parent's business, and so is its death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    source = None
    while remaining := [trial for trial in trials if not is_finished(state_of(cfg.out, trial), since)]:
        claimed = claim_next(cfg.out, trials, since)
        if claimed is None:
            time.sleep(POLL_SECONDS)
            continue
        trial, store = claimed
        source = source or preflight(config_of(cfg, remaining[0]))
        run_trial(cfg, trial, siblings(trial, table_trials), store, source, TrialLog(store.root / "log.txt"))
        store.close()
        write_table(cfg.out, table_trials)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def least_used(gpus: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The GPU that the fewest of the workers at `taken` have, the first of several; None where there is none."""
    return min(gpus, key=list(taken).count, default=None)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What a process that is started now finds in its environment, beside the rest."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _all_threads() -> int:
    configured = os.environ.get("OMP_NUM_THREADS", "")
    return int(configured) if configured.isdigit() and int(configured) else len(os.sched_getaffinity(0))
