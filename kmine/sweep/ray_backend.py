"""Cells spread over a Ray cluster; sole home of ray. All nodes see the folder of the sweep, the data and kmine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.config.sweep import SweepConfig
from kmine.errors import UserError
from kmine.setup.preflight import preflight
from kmine.store.run_folder import BusyError, RunFolder
from kmine.sweep.plan import write_table
from kmine.sweep.trials import (
    Trial,
    TrialLog,
    config_of,
    is_finished,
    run_trial,
    save_failure,
    state_of,
    trial_dir,
)
from kmine.sweep.workers import POLL_SECONDS, report_finished, siblings

BUSY = "busy"


def work_on_ray(
    cfg: SweepConfig, trials: Sequence[Trial], table_trials: Sequence[Trial], since: float, terminal: cli.Terminal
) -> None:
    """Do what is left of `trials` as tasks of one CPU (and one GPU, where the cluster has any and it is wanted) each.

    Without `cfg.address` a cluster of `cfg.processes` workers is started here, and ended with the work. Arguments as of
    `kmine.sweep.workers.work`.

    Raises:
        UserError: ray is not installed, or there is no cluster at the address.
    """
    ray = _ray()
    started = _connect(ray, cfg)
    cfg = replace(cfg, out=str(Path(cfg.out).resolve()))
    gpus = 1 if cfg.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    # A cell that takes its process down would do so again; the next command tries it once more.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_remote_trial)
    remaining = [trial for trial in trials if not is_finished(state_of(cfg.out, trial), since)]
    finished, count = set(trials) - set(remaining), max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Trial] = {}
    try:
        running |= {
            remote.remote(cfg, trial, siblings(trial, table_trials), since, str(Path.cwd())): trial
            for trial in interleave(remaining)
        }
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for done in ready:
                trial = running.pop(done)
                if _outcome(ray, done, cfg, trial) == BUSY:
                    time.sleep(POLL_SECONDS)
                    running[remote.remote(cfg, trial, siblings(trial, table_trials), since, str(Path.cwd()))] = trial
            if ready:
                write_table(cfg.out, table_trials)
                finished = report_finished(cfg, trials, since, terminal, finished, count)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        if started:
            ray.shutdown()


def interleave(trials: Sequence[Trial]) -> list[Trial]:
    """The first cell of each kin, then the second of each, and so on: what is shared is made before it is wanted."""
    num_seen: dict[Any, int] = {}
    turns = []
    for trial in trials:
        turns.append(num_seen.get(trial.share_key, 0))
        num_seen[trial.share_key] = turns[-1] + 1
    return [trial for _, trial in sorted(zip(turns, trials, strict=True), key=lambda pair: pair[0])]


def run_remote_trial(cfg: SweepConfig, trial: Trial, siblings: list[Trial], since: float, folder: str) -> str:
    """One cell on some node; `folder` is where relative paths of the settings begin. Returns how it ended."""
    os.chdir(folder)
    try:
        store = RunFolder(trial_dir(cfg.out, trial))
    except BusyError:
        return BUSY
    try:
        if not is_finished(state_of(cfg.out, trial), since):
            source = preflight(config_of(cfg, trial))
            run_trial(cfg, trial, siblings, store, source, TrialLog(store.root / "log.txt"))
    finally:
        store.close()
    return state_of(cfg.out, trial).get("status", "")


def _outcome(ray: Any, done: Any, cfg: SweepConfig, trial: Trial) -> str:
    """How a task ended; where it broke off, the cell is booked as failed."""
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        message = lines[0] if isinstance(cause, UserError) else f"{type(cause or error).__name__}: {lines[0]}"
        save_failure(cfg.out, trial, message)
        return "failed"


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing reaches the network unasked
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "backend ray: expected the package ray, it is not installed; pip install 'kmine[ray]', or use --processes"
        ) from error
    return ray


def _connect(ray: Any, cfg: SweepConfig) -> bool:
    """Whether a cluster was started or joined here, which is then to be left."""
    if ray.is_initialized():
        return False
    local = {} if cfg.address else {"num_cpus": cfg.processes, "include_dashboard": False}
    try:
        _refuse_silence(cfg.address or "")
        ray.init(address=cfg.address or "local", log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"address: expected a Ray cluster at {cfg.address or 'this machine'}, cannot reach it ({error}); start one "
            "with `ray start --head`, or leave --address out"
        ) from error
    return True


def _refuse_silence(address: str) -> None:
    """Ray itself tries for minutes, where nobody answers at HOST:PORT. Raises `OSError`."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
