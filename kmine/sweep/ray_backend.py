"""Trials on a Ray cluster. All nodes share the sweep's folder, the data and kmine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.errors import UserError
from kmine.io.log_file import LOG_FILE, LogFile
from kmine.io.ray_cluster import ray_cluster
from kmine.setup.preflight import preflight
from kmine.store.run_folder import BusyError, RunFolder
from kmine.sweep.plan import write_table
from kmine.sweep.trials import Session, Trial, config_of, is_finished, save_failure, state_of, trial_dir
from kmine.sweep.workers import POLL_SECONDS, report_finished

BUSY = "busy"


def work_on_ray(session: Session, terminal: cli.Terminal) -> None:
    """Train the unfinished trials as Ray tasks of one CPU each, and one GPU if the cluster has any.

    Without `cfg.address` a cluster of `cfg.processes` workers is started, and stopped at the end.

    Raises:
        UserError: ray is not installed, or no cluster at the address.
    """
    cfg = session.cfg
    with ray_cluster(cfg.address, "use --processes", cfg.processes) as ray:
        _work(ray, session, terminal)


def _work(ray: Any, session: Session, terminal: cli.Terminal) -> None:
    cfg = session.cfg
    session = replace(session, cfg=replace(cfg, out=str(Path(cfg.out).resolve())))
    gpus = 1 if cfg.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    # No retries: a trial that crashes its process would crash again; the next command retries it.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_remote_trial)
    remaining, count = session.remaining(), max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Trial] = {}
    try:
        for trial in interleave(remaining):
            running[remote.remote(session, trial, str(Path.cwd()))] = trial
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for done in ready:
                trial = running.pop(done)
                if _outcome(ray, done, session, trial) == BUSY:
                    time.sleep(POLL_SECONDS)
                    running[remote.remote(session, trial, str(Path.cwd()))] = trial
            if ready:
                write_table(session.cfg.out, session.table_trials)
                remaining = report_finished(session, remaining, count, terminal)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)


def interleave(trials: Sequence[Trial]) -> list[Trial]:
    """First trials of all groups of siblings, then second ones, and so on, so that round 0 is ready to be shared."""
    num_seen: dict[Any, int] = {}
    turns = []
    for trial in trials:
        turns.append(num_seen.get(trial.share_key, 0))
        num_seen[trial.share_key] = turns[-1] + 1
    return [trial for _, trial in sorted(zip(turns, trials, strict=True), key=lambda pair: pair[0])]


def run_remote_trial(session: Session, trial: Trial, folder: str) -> str:
    """Train one trial on a node; returns its status. Relative paths of the settings start at `folder`."""
    from kmine.sweep.training import run_trial

    os.chdir(folder)
    cfg = session.cfg
    try:
        run = RunFolder(trial_dir(cfg.out, trial))
    except BusyError:
        return BUSY
    with closing(run):
        if not is_finished(state_of(cfg.out, trial), session.since):
            run_trial(session, trial, run, preflight(config_of(cfg, trial)), LogFile(run.root / LOG_FILE))
    return state_of(cfg.out, trial).get("status", "")


def _outcome(ray: Any, done: Any, session: Session, trial: Trial) -> str:
    """Result of a task; a crashed one is recorded as a failed trial."""
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        message = lines[0] if isinstance(cause, UserError) else f"{type(cause or error).__name__}: {lines[0]}"
        save_failure(session.cfg.out, trial, message)
        return "failed"
