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
from kmine.store.run_folder import BusyError, RunStore
from kmine.sweep.plan import write_table
from kmine.sweep.trials import (
    Cell,
    Log,
    config_of,
    folder_of,
    is_settled,
    run_cell,
    save_failure,
    state_of,
)
from kmine.sweep.workers import PATIENCE, kin_of, tell

BUSY = "busy"


def work_on_ray(
    cfg: SweepConfig, cells: Sequence[Cell], rows: Sequence[Cell], since: float, terminal: cli.Terminal
) -> None:
    """Do what is left of `cells` as tasks of one CPU (and one GPU, where the cluster has any and it is wanted) each.

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
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(task)
    left = [cell for cell in cells if not is_settled(state_of(cfg.out, cell), since)]
    known, count = set(cells) - set(left), max(1, int(ray.cluster_resources().get("CPU", 1)))
    at: dict[Any, Cell] = {}
    try:
        at |= {remote.remote(cfg, cell, kin_of(cell, rows), since, str(Path.cwd())): cell for cell in spread(left)}
        while at:
            ready, _ = ray.wait(list(at), timeout=PATIENCE)
            for done in ready:
                cell = at.pop(done)
                if _outcome(ray, done, cfg, cell) == BUSY:
                    time.sleep(PATIENCE)
                    at[remote.remote(cfg, cell, kin_of(cell, rows), since, str(Path.cwd()))] = cell
            if ready:
                write_table(cfg.out, rows)
                known = tell(cfg, cells, since, terminal, known, count)
    finally:
        for unfinished in at:
            ray.cancel(unfinished, force=True)
        if started:
            ray.shutdown()


def spread(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each kin, then the second of each, and so on: what is shared is made before it is wanted."""
    seen: dict[Any, int] = {}
    turns = []
    for cell in cells:
        turns.append(seen.get(cell.kin, 0))
        seen[cell.kin] = turns[-1] + 1
    return [cell for _, cell in sorted(zip(turns, cells, strict=True), key=lambda pair: pair[0])]


def task(cfg: SweepConfig, cell: Cell, kin: list[Cell], since: float, folder: str) -> str:
    """One cell on some node; `folder` is where relative paths of the settings begin. Returns how it ended."""
    os.chdir(folder)
    try:
        store = RunStore(folder_of(cfg.out, cell))
    except BusyError:
        return BUSY
    try:
        if not is_settled(state_of(cfg.out, cell), since):
            source = preflight(config_of(cfg, cell))
            run_cell(cfg, cell, kin, store, source, Log(store.root / "log.txt"))
    finally:
        store.close()
    return state_of(cfg.out, cell).get("status", "")


def _outcome(ray: Any, done: Any, cfg: SweepConfig, cell: Cell) -> str:
    """How a task ended; where it broke off, the cell is booked as failed."""
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        said = lines[0] if isinstance(cause, UserError) else f"{type(cause or error).__name__}: {lines[0]}"
        save_failure(cfg.out, cell, said)
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
