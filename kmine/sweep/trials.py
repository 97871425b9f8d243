"""One trial of a sweep: a method, a model, a label fraction and a seed, with a run folder of its own.

    SWEEP/cells/NAME/   a run folder as of kmine.loop; run.json has the fields `method` and `arm` in addition
      cell.json         state: running, done or failed; if done or failed, also its row of sweep.csv
      log.txt           messages of the training
      error.txt         traceback of an unexpected failure

Nothing here loads torch, so that a plan is shown at once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.config import DataConfig, LoopConfig
from kmine.config.sweep import SweepConfig
from kmine.io.files import read_json, safe_name, write_json
from kmine.store.run_folder import BusyError, RunFolder

STATE = "cell.json"
ROUND0_FILES = ("round_00/model.safetensors", "round_00/metrics.json")

State = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """The varied settings."""

    method: str
    model: str
    label_fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder below `cells/`."""
        return safe_name(f"{self.model}-{self.label_fraction!r}-{self.seed}-{self.method}")

    @property
    def share_key(self) -> tuple[str, float, int]:
        """Equal for all trials that share round 0."""
        return self.model, self.label_fraction, self.seed

    def __str__(self) -> str:
        return f"{self.method}, {self.model}, {share_of_labels(self.label_fraction)}, seed {self.seed}"


def share_of_labels(fraction: float) -> str:
    """`all labels`, or `0.25 of the labels`."""
    return "all labels" if fraction == 1 else f"{fraction:g} of the labels"


def trial_dir(out: str | Path, trial: Trial) -> Path:
    """Run folder of a trial."""
    return Path(out) / "cells" / trial.name


def data_of(cfg: SweepConfig, label_fraction: float) -> DataConfig:
    """Data settings of a trial: the sweep's with this label fraction."""
    # fine_groups 1 would be one group, not all of them.
    if cfg.data.fine_groups is not None and label_fraction < 1:
        return replace(cfg.data, fine_groups=label_fraction)
    return replace(cfg.data, fine_groups=None, label_fraction=label_fraction)


def config_of(cfg: SweepConfig, trial: Trial) -> LoopConfig:
    """Settings of a trial: the sweep's, the varied ones, and those of `set` for its model and method.

    Raises:
        UserError: an unknown setting or an unfit value in `set`.
    """
    values = {name: value for name, value in cli.to_dict(cfg).items() if name in LoopConfig.__dataclass_fields__}
    values |= {"seed": trial.seed, "out": str(trial_dir(cfg.out, trial)), "baseline": False}
    values |= {"backend": "local", "address": None}  # those of the sweep spread its trials
    values["model"]["name"] = trial.model
    values["data"] = cli.to_dict(data_of(cfg, trial.label_fraction))
    method_settings = cfg.own_settings()
    changes = method_settings.get(trial.model, {}) | method_settings.get(trial.method, {})
    return cli.override(LoopConfig, values, changes, f"set: {trial.method}, {trial.model}")


# -- state


def state_of(out: str | Path, trial: Trial) -> State:
    """Content of cell.json; empty before the trial begins."""
    return read_json(trial_dir(out, trial) / STATE) or {}


def is_finished(state: State, since: float) -> bool:
    """Whether a trial is done, or failed after `since` (epoch seconds); older failures are retried."""
    return state.get("status") == "done" or (state.get("status") == "failed" and state.get("ended", 0.0) >= since)


def save_failure(out: str | Path, trial: Trial, error: str) -> None:
    """Record a failure and its message, as one line, in cell.json."""
    ended = {"ended": time.time(), "status": "failed", "error": " ".join(error.split())}
    write_json(trial_dir(out, trial) / STATE, {**asdict(trial), **ended})


@dataclass(frozen=True)
class Session:
    """Trials of one command."""

    cfg: SweepConfig
    trials: Sequence[Trial]
    """In the order of training."""
    table_trials: Sequence[Trial]
    """All trials of the sweep's folder, in the order of sweep.csv."""
    since: float
    """Start of the command, epoch seconds; earlier failures are retried."""

    def states(self) -> dict[Trial, State]:
        """State of each trial."""
        return {trial: state_of(self.cfg.out, trial) for trial in self.trials}

    def remaining(self) -> list[Trial]:
        """Trials that are not finished."""
        return [trial for trial, state in self.states().items() if not is_finished(state, self.since)]

    def siblings(self, trial: Trial) -> list[Trial]:
        """Other trials that share round 0 with `trial`."""
        return [other for other in self.table_trials if other.share_key == trial.share_key and other != trial]


def claim_next(session: Session) -> tuple[Trial, RunFolder] | None:
    """Claim the next unfinished trial that no other process has locked; returns it with its locked folder, or None.

    Trials whose sibling is training round 0 now come last, as they can share it later.
    """
    out, remaining = session.cfg.out, session.remaining()
    in_round0 = [
        trial
        for trial in remaining
        if state_of(out, trial).get("status") == "running"
        and not all((trial_dir(out, trial) / name).exists() for name in ROUND0_FILES)
    ]

    def is_blocked(trial: Trial) -> bool:
        return any(trial.share_key == other.share_key and trial != other for other in in_round0)

    for trial in sorted(remaining, key=is_blocked):
        try:
            run = RunFolder(trial_dir(out, trial))
        except BusyError:
            continue
        if not is_finished(state_of(out, trial), session.since):
            return trial, run
        run.close()
    return None


def record_crash(session: Session, pid: int, error: str) -> Trial | None:
    """Record the failure of the trial that the dead process `pid` of this machine was training; returns it, or None."""
    for trial, state in session.states().items():
        if (state.get("status"), state.get("pid"), state.get("host")) == ("running", pid, platform.node()):
            save_failure(session.cfg.out, trial, error)
            return trial
    return None
