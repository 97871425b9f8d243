"""Trials one after another in this process, or in several; each claims the next free trial."""

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
from kmine.sweep.trials import State, Trial, claim_next, config_of, is_finished, record_crash, state_of

POLL_SECONDS = 2.0
"""Interval of polling for trials that run in other processes."""


def work(
    cfg: SweepConfig,
    trials: Sequence[Trial],
    table_trials: Sequence[Trial],
    since: float,
    terminal: cli.Terminal,
    source: Source,
) -> None:
    """Train the unfinished of `trials` in this process; wait for those that run in other processes.

    Args:
        cfg: settings of the sweep.
        trials: trials of the plan.
        table_trials: all trials of the table.
        since: start of the command, epoch seconds; trials that failed later are not retried.
        terminal: shows progress.
        source: the data set.
    """
    waiting = False
    while remaining := [trial for trial in trials if not is_finished(state_of(cfg.out, trial), since)]:
        claimed = claim_next(cfg.out, trials, since)
        if claimed is None:
            if not waiting:
                terminal.log(f"{len(remaining)} trials are running in another process; waiting")
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        from kmine.sweep.training import run_trial

        waiting, (trial, run) = False, claimed
        states = {other: state_of(cfg.out, other) for other in trials}
        terminal.log(
            f"trial {len(trials) - len(remaining) + 1} of {len(trials)}: {trial}; time left: "
            f"{time_left(trials, states, since, 1)}"
        )
        try:
            state = run_trial(cfg, trial, siblings(trial, table_trials), run, source, terminal)
        finally:
            terminal.stop()
            run.close()
        write_table(cfg.out, table_trials)
        terminal.log(f"{trial}: {outcome(state)}")


def siblings(trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
    """Other trials that share round 0 with `trial`."""
    return [other for other in trials if other.share_key == trial.share_key and other != trial]


def outcome(state: State) -> str:
    """Result of a finished trial as text."""
    if state.get("status") != "done":
        return f"failed: {state.get('error', 'unknown')}"
    dice = state.get("val_dice")
    return f"validation Dice {'unknown' if dice is None else f'{dice:.3f}'}, {state['took']:.0f} s"


# -- several processes


def work_in_processes(
    cfg: SweepConfig, trials: Sequence[Trial], table_trials: Sequence[Trial], since: float, terminal: cli.Terminal
) -> None:
    """`work` in `cfg.processes` workers; a crash fails one trial, and a new worker replaces the crashed one.

    Workers are spread over the GPUs unless `device` names one.
    """
    context = multiprocessing.get_context("spawn")
    count = min(cfg.processes, len(trials))
    gpus = visible_gpus() if cfg.device in ("auto", "cuda") else []
    workers: dict[Any, str | None] = {}

    def begin() -> None:
        gpu = least_used(gpus, list(workers.values()))
        environment = {"OMP_NUM_THREADS": str(max(1, _all_threads() // count))}
        with _environment(environment | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})):
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
    """Record the crash of a worker on its trial; returns True: start another worker.

    Raises:
        UserError: the worker had no trial yet, so another would crash as well.
    """
    trial = record_crash(cfg.out, trials, worker.pid, ended_by(worker.exitcode))
    if trial is None:
        raise UserError(f"a worker ended before its first trial ({ended_by(worker.exitcode)}); try --processes 1")
    write_table(cfg.out, table_trials)
    return True


def ended_by(exitcode: int) -> str:
    """Exit code of a process, negative for a signal, as text."""
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
    """Log trials that are finished but not in `finished`; returns all finished ones."""
    states = {trial: state_of(cfg.out, trial) for trial in trials}
    ended = {trial for trial in trials if is_finished(states[trial], since)}
    for trial in trials:
        if trial in ended - finished:
            terminal.log(
                f"{trial}: {outcome(states[trial])}; {len(ended)} of {len(trials)} trials, time left: "
                f"{time_left(trials, states, since, processes)}"
            )
    return ended


def _worker(cfg: SweepConfig, trials: list[Trial], table_trials: list[Trial], since: float) -> None:
    """Main function of a worker: train trials until none is left. Its parent handles Ctrl-C; it ends with the
    parent."""
    from kmine.sweep.training import TrialLog, run_trial

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    source = None
    while remaining := [trial for trial in trials if not is_finished(state_of(cfg.out, trial), since)]:
        claimed = claim_next(cfg.out, trials, since)
        if claimed is None:
            time.sleep(POLL_SECONDS)
            continue
        trial, run = claimed
        source = source or preflight(config_of(cfg, remaining[0]))
        run_trial(cfg, trial, siblings(trial, table_trials), run, source, TrialLog(run.root / "log.txt"))
        run.close()
        write_table(cfg.out, table_trials)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def visible_gpus() -> list[str]:
    """GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def least_used(gpus: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The GPU with the fewest entries in `taken`, the first of several; None without GPUs."""
    return min(gpus, key=list(taken).count, default=None)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, for processes started there."""
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
