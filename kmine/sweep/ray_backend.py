"""Trials on a Ray cluster; the only module that imports ray. All nodes share the sweep's folder, the data and kmine."""

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
from kmine.sweep.trials import Trial, config_of, is_finished, save_failure, state_of, trial_dir
from kmine.sweep.workers import POLL_SECONDS, report_finished, siblings

BUSY = "busy"


def work_on_ray(
    cfg: SweepConfig, trials: Sequence[Trial], table_trials: Sequence[Trial], since: float, terminal: cli.Terminal
) -> None:
    """Train the unfinished of `trials` as Ray tasks of one CPU each, and one GPU if the cluster has any.

    Without `cfg.address` a cluster of `cfg.processes` workers is started, and stopped at the end. Arguments: see
    `kmine.sweep.workers.work`.

    Raises:
        UserError: ray is not installed, or no cluster at the address.
    """
    ray = _ray()
    started = _connect(ray, cfg)
    cfg = replace(cfg, out=str(Path(cfg.out).resolve()))
    gpus = 1 if cfg.device != "cpu" and ray.cluster_resources().get("GPU") else 0
    # No retries: a trial that crashes its process would crash again; the next command retries it.
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
    """First trials of all groups of siblings, then second ones, and so on, so that round 0 is ready to be shared."""
    num_seen: dict[Any, int] = {}
    turns = []
    for trial in trials:
        turns.append(num_seen.get(trial.share_key, 0))
        num_seen[trial.share_key] = turns[-1] + 1
    return [trial for _, trial in sorted(zip(turns, trials, strict=True), key=lambda pair: pair[0])]


def run_remote_trial(cfg: SweepConfig, trial: Trial, siblings: list[Trial], since: float, folder: str) -> str:
    """Train one trial on a node; returns its status. Relative paths of the settings start at `folder`."""
    from kmine.sweep.training import TrialLog, run_trial

    os.chdir(folder)
    try:
        run = RunFolder(trial_dir(cfg.out, trial))
    except BusyError:
        return BUSY
    try:
        if not is_finished(state_of(cfg.out, trial), since):
            source = preflight(config_of(cfg, trial))
            run_trial(cfg, trial, siblings, run, source, TrialLog(run.root / "log.txt"))
    finally:
        run.close()
    return state_of(cfg.out, trial).get("status", "")


def _outcome(ray: Any, done: Any, cfg: SweepConfig, trial: Trial) -> str:
    """Result of a task; a crashed one is recorded as a failed trial."""
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        message = lines[0] if isinstance(cause, UserError) else f"{type(cause or error).__name__}: {lines[0]}"
        save_failure(cfg.out, trial, message)
        return "failed"


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network access unless requested
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "backend ray: expected the package ray, it is not installed; pip install 'kmine[ray]', or use --processes"
        ) from error
    return ray


def _connect(ray: Any, cfg: SweepConfig) -> bool:
    """Start or join a cluster; False if this process is already connected."""
    if ray.is_initialized():
        return False
    local = {} if cfg.address else {"num_cpus": cfg.processes, "include_dashboard": False}
    try:
        _check_reachable(cfg.address or "")
        ray.init(address=cfg.address or "local", log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"address: expected a Ray cluster at {cfg.address or 'this machine'}, cannot reach it ({error}); start one "
            "with `ray start --head`, or omit --address"
        ) from error
    return True


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nothing listens at HOST:PORT; ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
