"""Trials one after another in this process, or in several; each claims the next free trial."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from typing import Any

from kmine import cli
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.io.console import STOPS
from kmine.io.log_file import LOG_FILE, LogFile
from kmine.setup.preflight import preflight
from kmine.sweep.plan import time_left, write_table
from kmine.sweep.trials import Session, State, Trial, claim_next, config_of, record_crash

POLL_SECONDS = 2.0
"""Interval of polling for trials that run in other processes."""


def work(session: Session, source: Source | None = None, terminal: cli.Terminal | None = None) -> None:
    """Train all unfinished trials; wait for those that run in other processes.

    `source` is the data set, if it is open. Without a terminal, progress goes to the log.txt of each trial.
    """
    cfg, waiting = session.cfg, False
    log = terminal.log if terminal else lambda text: None
    while remaining := session.remaining():
        claimed = claim_next(session)
        if claimed is None:
            if not waiting:
                log(f"{len(remaining)} trials are running in another process; waiting")
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        from kmine.sweep.training import run_trial

        waiting, (trial, run) = False, claimed
        done, count = len(session.trials) - len(remaining), len(session.trials)
        log(f"trial {done + 1} of {count}: {trial}; time left: {time_left(session.states(), session.since, 1)}")
        with closing(run):
            source = source or preflight(config_of(cfg, trial))
            state = run_trial(session, trial, run, source, LogFile(run.root / LOG_FILE, terminal))
        write_table(cfg.out, session.table_trials)
        log(f"{trial}: {outcome(state)}")


def outcome(state: State) -> str:
    """Result of a finished trial as text."""
    if state.get("status") != "done":
        return f"failed: {state.get('error', 'unknown')}"
    dice = state.get("val_dice")
    return f"validation Dice {'unknown' if dice is None else f'{dice:.3f}'}, {state['took']:.0f} s"


# -- several processes


def work_in_processes(session: Session, terminal: cli.Terminal) -> None:
    """`work` in `cfg.processes` workers; a crash fails one trial, and a new worker replaces the crashed one.

    Workers are spread over the GPUs unless `device` names one.

    Raises:
        UserError: a worker ended before it had a trial.
    """
    context, cfg = multiprocessing.get_context("spawn"), session.cfg
    count = min(cfg.processes, len(session.trials))
    gpus = visible_gpus() if cfg.device in ("auto", "cuda") else []
    workers: dict[Any, str | None] = {}

    def begin() -> None:
        gpu = least_used(gpus, list(workers.values()))
        environment = {"OMP_NUM_THREADS": str(max(1, _all_threads() // count))}
        with _environment(environment | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})):
            worker = context.Process(target=_worker, args=(session,))
            worker.start()
        workers[worker] = gpu

    remaining = session.remaining()
    try:
        for _ in range(count):
            begin()
        while workers:
            wait([worker.sentinel for worker in workers], timeout=1)
            for worker in [worker for worker in workers if not worker.is_alive()]:
                del workers[worker]
                if worker.exitcode == -signal.SIGTERM:
                    time.sleep(0.5)  # where all processes get the signal, it ends this one here
                if worker.exitcode:
                    reason = ended_by(worker.exitcode)
                    if record_crash(session, worker.pid, reason) is None:  # another would crash as well
                        raise UserError(f"a worker ended before its first trial ({reason}); try --processes 1")
                    write_table(cfg.out, session.table_trials)
                    begin()
            remaining = report_finished(session, remaining, count, terminal)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def auto_processes(machine: Any, device: str) -> int:
    """Workers for a `kmine.plan.machine.Machine`: one a GPU, else one per two cores and 4 GB of free memory."""
    by_cores = min(machine.cores // 2, int(machine.ram_gb // 4))
    by_gpus = len(visible_gpus()) if device in ("auto", "cuda") else 1
    return max(1, by_gpus if machine.is_gpu else by_cores)


def ended_by(exitcode: int) -> str:
    """Exit code of a process, negative for a signal, as text."""
    if exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"its process was killed ({name})" + (": out of memory?" if name == "SIGKILL" else "")


def report_finished(session: Session, remaining: Sequence[Trial], workers: int, terminal: cli.Terminal) -> list[Trial]:
    """Log which of `remaining` are finished now; returns those that are not."""
    states, now, count = session.states(), session.remaining(), len(session.trials)
    for trial in (trial for trial in remaining if trial not in now):
        time_text = time_left(states, session.since, workers)
        terminal.log(f"{trial}: {outcome(states[trial])}; {count - len(now)} of {count} trials, time left: {time_text}")
    return now


def _worker(session: Session) -> None:
    """Main function of a worker. Its parent handles Ctrl-C and a hangup, and it ends with its parent."""
    for signum in (signal.SIGINT, *STOPS[1:]):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    work(session)


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
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _all_threads() -> int:
    configured = os.environ.get("OMP_NUM_THREADS", "")
    return int(configured) if configured.isdigit() and int(configured) else len(os.sched_getaffinity(0))
