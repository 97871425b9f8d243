"""One cell of a sweep: a method, a model, a label fraction and a seed; trained into a run folder of its own.

    SWEEP/cells/NAME/   a run folder as of kmine.loop, its run.json with `method` and `arm` beside the rest
      cell.json         where the cell stands: running, done or failed; when done or failed, its row of sweep.csv
      log.txt           what was said on the way
      error.txt         where it failed and the message alone would not do

Heavy imports wait until a cell is trained, so that a plan is there at once.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine import cli
from kmine.config import DataConfig, LoopConfig
from kmine.config.sweep import MINING, ORACLE, SweepConfig
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.io.files import UNFINISHED, read_json, safe_name, write_json
from kmine.store.run_folder import BusyError, RunFolder
from kmine.types import stopped_by

if TYPE_CHECKING:
    from kmine.training.task import Task
    from kmine.types import ProgressReporter, RoundResult

STATE = "cell.json"
SHARED_ARTIFACTS = ("round_00", "fold_*/round_00", "classifier", "witness/round_00", "witness_fold_*/round_00")
"""What cells of one model, fraction and seed have in common. All of it is signed: what does not fit is made anew."""
ROUND0_FILES = ("round_00/model.safetensors", "round_00/metrics.json")
EXPECTED = (UserError, FloatingPointError, MemoryError)
"""Errors whose message says it all; of others the traceback is kept."""

State = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is varied in a sweep."""

    method: str
    model: str
    label_fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below `cells/`."""
        return safe_name(f"{self.model}-{self.label_fraction!r}-{self.seed}-{self.method}")

    @property
    def share_key(self) -> tuple[str, float, int]:
        """The same for all cells that share round 0."""
        return self.model, self.label_fraction, self.seed

    def __str__(self) -> str:
        return f"{self.method}, {self.model}, {self.label_fraction:g} of the labels, seed {self.seed}"


def trial_dir(out: str | Path, trial: Trial) -> Path:
    """The cell's run folder."""
    return Path(out) / "cells" / trial.name


def data_of(cfg: SweepConfig, label_fraction: float) -> DataConfig:
    """The data as a cell has them: the sweep's, so much of it labeled."""
    # 1 would be a single group, not all of them: all groups are all labels.
    if cfg.data.fine_groups is not None and label_fraction < 1:
        return replace(cfg.data, fine_groups=label_fraction)
    return replace(cfg.data, fine_groups=None, label_fraction=label_fraction)


def config_of(cfg: SweepConfig, trial: Trial) -> LoopConfig:
    """The settings of a cell: the sweep's, what is varied, and what `set` says of its model and of its method.

    Raises:
        UserError: for what `set` says and no setting takes.
    """
    values = cli.to_dict(cfg)
    values = {name: values[name] for name in LoopConfig.__dataclass_fields__}
    values |= {"seed": trial.seed, "out": str(trial_dir(cfg.out, trial)), "baseline": False}
    values["model"]["name"] = trial.model
    values["data"] = cli.to_dict(data_of(cfg, trial.label_fraction))
    method_settings = cfg.own_settings()
    changes = method_settings.get(trial.model, {}) | method_settings.get(trial.method, {})
    return cli.override(LoopConfig, values, changes, f"set: {trial.method}, {trial.model}")


# -- where a cell stands


def state_of(out: str | Path, trial: Trial) -> State:
    """What cell.json holds; empty before the cell was begun."""
    return read_json(trial_dir(out, trial) / STATE) or {}


def is_finished(state: State, since: float) -> bool:
    """Whether nothing is left to do: done, or failed after `since` (epoch seconds); an older failure is retried."""
    return state.get("status") == "done" or (state.get("status") == "failed" and state.get("ended", 0.0) >= since)


def save_failure(out: str | Path, trial: Trial, error: str) -> None:
    """Say in cell.json that the cell failed, and how, in one line."""
    ended = {"ended": time.time(), "status": "failed", "error": " ".join(error.split())}
    write_json(trial_dir(out, trial) / STATE, {**asdict(trial), **ended})


def claim_next(out: str | Path, trials: Sequence[Trial], since: float) -> tuple[Trial, RunFolder] | None:
    """The first cell that is to be done and that nobody is at, with its folder, held; None where there is none.

    Where another cell of the same kin is at round 0 just now, cells of other kin come first: it can then be shared.
    """
    states = {trial: state_of(out, trial) for trial in trials}
    remaining = [trial for trial in trials if not is_finished(states[trial], since)]
    running = [trial for trial in remaining if states[trial].get("status") == "running"]
    in_round0 = [
        trial for trial in running if not all((trial_dir(out, trial) / name).exists() for name in ROUND0_FILES)
    ]
    blocked = [
        trial
        for trial in remaining
        if any(trial.share_key == other.share_key and trial != other for other in in_round0)
    ]
    for trial in [*(trial for trial in remaining if trial not in blocked), *blocked]:
        try:
            store = RunFolder(trial_dir(out, trial))
        except BusyError:
            continue
        if not is_finished(state_of(out, trial), since):
            return trial, store
        store.close()
    return None


def record_crash(out: str | Path, trials: Iterable[Trial], pid: int, error: str) -> Trial | None:
    """Save the failure of the cell that the dead process `pid` of this machine was at; the cell, if there is one."""
    for trial in trials:
        state = state_of(out, trial)
        if (state.get("status"), state.get("pid"), state.get("host")) == ("running", pid, platform.node()):
            save_failure(out, trial, error)
            return trial
    return None


# -- the work


class TrialLog:
    """A `ProgressReporter` that keeps what is said in the cell's log.txt: of several cells at once a terminal shows none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, title: str, total: int) -> None:
        """A piece of work begins."""
        self.log(f"{title} ({total})")

    def advance(self, done: int, text: str = "") -> None:
        """Not written down."""

    def log(self, text: str) -> None:
        """A line of the log."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def run_trial(
    cfg: SweepConfig,
    trial: Trial,
    siblings: Iterable[Trial],
    store: RunFolder,
    source: Source,
    progress: ProgressReporter,
) -> State:
    """Train a cell, or go on with it, and say in cell.json how it ended; the content of that.

    Whatever goes wrong in it is its failure alone; `KeyboardInterrupt` passes, and leaves the cell unfinished.

    Args:
        cfg: of the sweep.
        trial: which one.
        siblings: cells of the same model, fraction and seed; what they have done already is not done again.
        store: its run folder, held.
        source: the data set.
        progress: told about the work.
    """
    path, began = store.root / STATE, time.time()
    running = {"status": "running", "pid": os.getpid(), "host": platform.node()}
    write_json(path, {**asdict(trial), **running})
    (store.root / "error.txt").unlink(missing_ok=True)
    try:
        row = _train(cfg, trial, siblings, store, source, progress)
        ended = time.time()
        write_json(path, {**asdict(trial), **row, "status": "done", "ended": ended, "took": round(ended - began, 1)})
    except Exception as error:
        if not isinstance(error, EXPECTED):
            (store.root / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        message = (
            str(error) if isinstance(error, UserError | FloatingPointError) else f"{type(error).__name__}: {error}"
        )
        save_failure(cfg.out, trial, message)
    return state_of(cfg.out, trial)


def _train(
    cfg: SweepConfig,
    trial: Trial,
    siblings: Iterable[Trial],
    store: RunFolder,
    source: Source,
    progress: ProgressReporter,
) -> State:
    """Fields of the cell's row in sweep.csv."""
    from kmine.methods import registry as arms
    from kmine.setup.open import content_fingerprints, open_task, open_truth
    from kmine.setup.provenance import (
        count_parameters,
        forget_peak_memory,
        peak_memory_mb,
        preparing,
        provenance,
    )

    forget_peak_memory()
    loop = config_of(cfg, trial)
    store.claim(cli.to_dict(loop), source.fingerprint(), lambda: content_fingerprints(loop, source, store))
    for other in siblings:
        link_shared_artifacts(trial_dir(cfg.out, other), store.root)
    task = open_task(loop, source, store, progress, mines=trial.method == MINING)
    store.update_run(**provenance(loop, task, source), method=trial.method, stopped_by="interrupted")
    truth = open_truth(task, source) if trial.method == ORACLE else None
    with preparing(store):  # rounds come one by one, afterwards; what is done before them is done here
        rounds = arms.method(trial.method, truth)(task)
    results = list(rounds)
    last = [result for result in results if result.adopted][-1]
    own_rounds = trial.method in arms.ROOT_METHODS
    costs = {
        "steps": num_steps(task, results, own_rounds),
        "peak_memory_mb": peak_memory_mb(),
        "seconds": round(store.preparation_seconds() + sum(sum(result.seconds.values()) for result in results), 1),
    }
    store.update_run(
        stopped_by=stopped_by(results, loop.rounds) if own_rounds else "rounds",
        adopted_round=last.round_idx,
        arm=arms.method_dir_of(trial.method)
        if last.round_idx
        else "",  # round 0 lies in the run folder, whoever goes on
        **costs,
    )
    return costs | {
        "num_labeled": len(task.labeled),
        "num_unlabeled": len(task.unlabeled),
        "val_dice": last.metrics.dice,
        "val_dice_final": last.final_metrics.dice,
        "num_parameters": count_parameters(task),
    }


def num_steps(task: Task, results: Sequence[RoundResult], by_pseudo_masks: bool) -> int:
    """Optimizer steps of the local model that were really taken; a round that kept no pseudo mask took none."""
    later = [result for result in results if result.round_idx]
    trained = [result for result in later if not (by_pseudo_masks and result.has_no_pseudo_masks)]
    return task.cfg.fit.steps + len(trained) * task.cfg.fit.round_steps


def link_shared_artifacts(source_dir: Path, target_dir: Path) -> None:
    """Let a run begin with what a run of its kin has finished of round 0 and the like, by hard links where they exist.

    Files are only ever replaced, never written into, so neither run can change the other's.
    """
    for file in (path for pattern in SHARED_ARTIFACTS for path in source_dir.glob(f"{pattern}/*")):
        if file.name.startswith(".") or file.name == "fit_state.safetensors" or not file.is_file():
            continue
        target = target_dir / file.relative_to(source_dir)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except FileExistsError:
            continue
        except OSError:  # another file system, or one without links
            unfinished = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
            shutil.copyfile(file, unfinished)
            unfinished.replace(target)
