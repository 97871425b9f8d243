"""Training of one trial in its run folder, and its row of sweep.csv."""

from __future__ import annotations

import os
import platform
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kmine.config.sweep import ORACLE
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.io.files import UNFINISHED, write_json
from kmine.methods.registry import ROOT_METHODS, method, method_dir_of
from kmine.report.training_curves import CURVES, curves_picture
from kmine.setup.open import begin_run, open_truth
from kmine.setup.provenance import count_parameters, forget_peak_memory, peak_memory_mb, preparing
from kmine.store.history import read_history
from kmine.store.run_folder import FOLD_TRAININGS, RunFolder
from kmine.sweep.trials import STATE, Session, State, Trial, config_of, save_failure, state_of, trial_dir
from kmine.training.rounds import kept_round
from kmine.training.task import Task
from kmine.types import ProgressReporter, RoundResult, stopped_by

EXPECTED = (UserError, FloatingPointError, MemoryError)
"""Errors with a sufficient message; of others the traceback is kept."""
SHARED_ARTIFACTS = ("round_00", "classifier", "witness/round_00", *FOLD_TRAININGS)
"""Artifacts that trials of one model, fraction and seed share. All are signed: one that does not fit is made again."""


def run_trial(session: Session, trial: Trial, run: RunFolder, source: Source, progress: ProgressReporter) -> State:
    """Train a trial, or resume it, in its locked folder `run` and record its state in cell.json; returns that state.

    Finished artifacts of the trial's siblings are shared. Every exception is recorded as a failure of the trial;
    `KeyboardInterrupt` passes and leaves it unfinished.
    """
    path, began = run.root / STATE, time.time()
    running = {"status": "running", "pid": os.getpid(), "host": platform.node()}
    write_json(path, {**asdict(trial), **running})
    (run.root / "error.txt").unlink(missing_ok=True)
    try:
        row = _train(session, trial, run, source, progress)
        ended = time.time()
        write_json(path, {**asdict(trial), **row, "status": "done", "ended": ended, "took": round(ended - began, 1)})
    except Exception as error:
        if not isinstance(error, EXPECTED):
            (run.root / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        has_cure = isinstance(error, UserError | FloatingPointError)
        save_failure(session.cfg.out, trial, str(error) if has_cure else f"{type(error).__name__}: {error}")
    return state_of(session.cfg.out, trial)


def _train(session: Session, trial: Trial, run: RunFolder, source: Source, progress: ProgressReporter) -> State:
    """Train a trial, or resume it; returns the fields of its row in sweep.csv."""
    forget_peak_memory()
    loop = config_of(session.cfg, trial)
    task = begin_run(loop, source, run, progress, method=trial.method)
    run.update_run(method=trial.method)
    for other in session.siblings(trial):
        link_shared_artifacts(trial_dir(session.cfg.out, other), run.root)
    truth = open_truth(task, source) if trial.method == ORACLE else None
    with preparing(run):  # adaptation and calibration end before the first round is requested
        rounds = method(trial.method, truth)(task)
    results = list(rounds)
    kept = kept_round(results)
    retrained = [result.round_idx for result in results if result.retrained]
    run.write_text(CURVES, curves_picture(read_history(run), retrained))
    in_root = trial.method in ROOT_METHODS
    costs: State = {
        "steps": num_steps(task, results, in_root),
        "peak_memory_mb": peak_memory_mb(),
        "seconds": round(run.preparation_seconds() + sum(sum(result.seconds.values()) for result in results), 1),
    }
    run.update_run(
        stopped_by=stopped_by(results, loop.rounds) if in_root else "rounds",
        adopted_round=kept.round_idx,
        arm=method_dir_of(trial.method) if kept.round_idx else "",  # round 0 of every method is in the run folder
        **costs,
    )
    return costs | {
        "num_labeled": len(task.labeled),
        "num_unlabeled": len(task.unlabeled),
        "val_dice": kept.metrics.dice,
        "val_dice_final": kept.final_metrics.dice,
        "val_score": kept.metrics.score,
        "num_parameters": count_parameters(task),
    }


def num_steps(task: Task, results: Sequence[RoundResult], by_pseudo_masks: bool) -> int:
    """Optimizer steps of round 0 and of all rounds, or of the one schedule in their place.

    With `by_pseudo_masks`, rounds without pseudo masks took none.
    """
    later = [result for result in results if result.round_idx and not result.retrained]
    trained = [result for result in later if not (by_pseudo_masks and result.has_no_pseudo_masks)]
    num_rounds = task.cfg.rounds if results[0].retrained else len(trained)
    return task.cfg.fit.steps + num_rounds * task.cfg.fit.round_steps


def link_shared_artifacts(source_dir: Path, target_dir: Path) -> None:
    """Link finished artifacts of a sibling's run folder into another, by hard links where possible.

    Files are replaced, never written into, so neither run can change those of the other.
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
