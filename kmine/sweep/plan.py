"""What a sweep has to do, what is done of it, and its table: sweep.csv, written from the cells' own files.

SWEEP/config.yaml   the settings
      sweep.json    the data's fingerprint; the cells, in the order of the plan
      sweep.csv     one row a cell that is done or failed, in that order
      cells/        see kmine.sweep.trials
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from kmine import cli
from kmine.config.sweep import ORACLE, SweepConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.source import Source
from kmine.data.split_file import read_split, resolve_splits
from kmine.data.splits import Splits, merge_duplicates
from kmine.errors import UserError
from kmine.io.errors import user_errors
from kmine.io.files import UNFINISHED, read_json, write_atomic, write_json
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.store.settings import RESUMABLE_CHANGES
from kmine.sweep.trials import (
    State,
    Trial,
    config_of,
    data_of,
    is_finished,
    state_of,
    trial_dir,
)

COLUMNS = (
    *("method", "model", "label_fraction", "seed", "status", "error", "run", "num_labeled", "num_unlabeled", "steps"),
    *("val_dice", "val_dice_final", "seconds", "peak_memory_mb", "num_parameters"),
)
VARIED = ("methods", "models", "fractions", "seeds", "set", "seed", "baseline", "model.name", "data.label_fraction")
EXECUTION_SETTINGS = ("processes", "backend", "address", "dry_run")
"""Settings that may differ when a sweep is taken up again: more cells may come, and how they are done changes none."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    trials: list[Trial]
    """In the order of the work: seed by seed, so that early rows are a small sweep of their own."""
    skipped: list[tuple[Trial, str]]
    """Cells that cannot be, and why."""
    sizes: dict[tuple[float, int], tuple[int, int]]
    """(label fraction, seed) -> numbers of labeled and unlabeled images."""


def make_plan(cfg: SweepConfig) -> tuple[Plan, Source]:
    """The plan of a sweep and its data set; every image is decoded (once, ever), no mask.

    Raises:
        UserError: whatever is wrong for all cells alike: names, settings, data, splits.
    """
    source = _refused_early(cfg)
    splits = dict(_splits(cfg, source))
    trials, skipped = [], []
    masked = {ref.sample_id for ref in source.refs() if ref.has_mask}
    for seed, fraction, model, method in product(cfg.seeds, cfg.fractions, cfg.models, cfg.methods):
        trial, unlabeled = Trial(method, model, fraction, seed), splits[fraction, seed].unlabeled
        reason = ""
        if method != "supervised" and not unlabeled:
            reason = "nothing is unlabeled, so there is nothing but supervised"
        elif method == ORACLE and masked.isdisjoint(unlabeled):
            reason = "no unlabeled image has a mask, so the oracle knows nothing"
        if reason:
            skipped.append((trial, reason))
        else:
            trials.append(trial)
    sizes = {key: (len(drawn.labeled), len(drawn.unlabeled)) for key, drawn in splits.items()}
    if not trials:
        raise UserError(f"nothing to do: {skipped[0][1]}; lower fractions, or add supervised to methods")
    return Plan(trials, skipped, sizes), source


def _refused_early(cfg: SweepConfig) -> Source:
    """The data set, once names and settings of all methods and models were looked at."""
    own, source = cfg.own_settings(), None
    for method, model in product(cfg.methods, cfg.models):
        loop = config_of(cfg, Trial(method, model, cfg.fractions[0], cfg.seeds[0]))
        if source is None or method in own or method == cfg.methods[0]:
            source = preflight(loop)
    assert source is not None, "there is at least one method and one model"
    return source


def _splits(cfg: SweepConfig, source: Source) -> Iterator[tuple[tuple[float, int], Splits]]:
    """The splits of each fraction and seed, as each cell will draw them."""
    data = cfg.data
    given_split = read_split(data.split_file, source)
    if given_split is not None and given_split.rows is not None:
        raise UserError(
            f"data.split_file {data.split_file}: expected who is for training, validation and test, got the splits of "
            "a run, which say who is labeled, too; a sweep draws that: give a table of sample_id,split"
        )
    cache = SampleCache(source, data.size, Path(data.cache_dir).expanduser() if data.cache_dir else None, data.on_error)
    refs = [ref for ref in cache.refs if given_split is None or ref.sample_id in given_split.sides]
    refs = list(merge_duplicates(refs, cache.hashes, data.duplicate_distance))  # slow for many images: once for all
    for fraction, seed in product(cfg.fractions, cfg.seeds):
        drawn = replace(data_of(cfg, fraction), duplicate_distance=-1)
        yield (fraction, seed), resolve_splits(drawn, seed, refs, cache.hashes, given_split)


# -- the folder


@contextmanager
def _locked(out: str | Path) -> Iterator[Path]:
    """The folder of the sweep, while no other process writes its table or takes it."""
    root = Path(out)
    with user_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".sweep.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def claim(cfg: SweepConfig, plan: Plan, source: Source) -> list[Trial]:
    """Take the folder for these settings and data, or refuse; all cells of the folder, those of earlier commands first.

    More methods, models, fractions and seeds may come to a sweep. One in which nothing was trained yet gives way.

    Raises:
        UserError: naming the field that differs.
    """
    with _locked(cfg.out) as root:
        if (root / "run.json").exists():
            raise UserError(f"{root} holds a run of kmine.loop; choose another --out")
        for path in root.glob(f".*{UNFINISHED}"):
            path.unlink()  # what a killed process left of a file it was writing
        previous, trials, fingerprint = read_json(root / "sweep.json") or {}, [], source.fingerprint()
        if any(root.glob("cells/**/*.safetensors")):
            trials = [Trial(*values) for values in previous.get("cells", [])]
            _refuse_other(cfg, root, previous, trials)
            fingerprint = _same_data(cfg, root, str(previous.get("data_fingerprint")), source, trials)
        trials += [trial for trial in plan.trials if trial not in trials]
        write_json(
            root / "sweep.json", {"data_fingerprint": fingerprint, "cells": [astuple(trial) for trial in trials]}
        )
        write_atomic(root / "config.yaml", yaml.safe_dump(cli.to_dict(cfg), sort_keys=False).encode())
    return trials


def _refuse_other(cfg: SweepConfig, root: Path, previous: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Refuse settings that are not those of the cells that are there."""
    try:
        before = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        old, new = cli.flat(before), cli.flat(cli.to_dict(cfg))
        own = replace(
            cfg, set=before["set"], models=list(dict.fromkeys(trial.model for trial in trials))
        ).own_settings()
    except (OSError, AttributeError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{root}: expected the settings of a sweep in config.yaml; choose another --out") from error
    existing = {name for trial in trials for name in (trial.method, trial.model)}
    for name, settings in [*own.items(), *cfg.own_settings().items()]:
        for key in settings if name in existing else ():
            old[f"set {name}.{key}"] = own.get(name, {}).get(key)
            new[f"set {name}.{key}"] = cfg.own_settings().get(name, {}).get(key)
    for key in sorted(set(old) | set(new)):
        if key not in (*RESUMABLE_CHANGES, *VARIED, *EXECUTION_SETTINGS) and old.get(key) != new.get(key):
            raise UserError(
                f"{root} holds a sweep with {key} = {old.get(key)!r}, this command has {new.get(key)!r}; "
                "choose another --out, or give the same settings to resume"
            )


def _same_data(cfg: SweepConfig, root: Path, previous: str, source: Source, trials: Sequence[Trial]) -> str:
    """The fingerprint that the sweep began with, where the files are the same or were copied; else refuse."""
    if previous == source.fingerprint():
        return previous
    for trial in trials:
        folder = trial_dir(root, trial)
        stored_contents = (read_json(folder / "run.json") or {}).get("data_contents")
        if stored_contents is not None:
            from kmine.setup.open import content_fingerprints

            # It is read, not held: another process may be at it.
            if content_fingerprints(config_of(cfg, trial), source, RunFolder(folder, follows=True)) == stored_contents:
                return previous
            break
    raise UserError(
        f"{root}: the data are not those this sweep began with (fingerprint {source.fingerprint()[:12]}, "
        f"was {previous[:12]}); choose another --out"
    )


def write_table(out: str | Path, trials: Sequence[Trial]) -> None:
    """Write sweep.csv anew, from what every cell says of itself: whoever writes last, no row is lost."""
    with _locked(out) as root:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for trial in trials:
            state = state_of(root, trial)
            if state.get("status") in ("done", "failed"):
                state |= {"run": trial_dir(root, trial).relative_to(root).as_posix()}
                writer.writerow(["" if state.get(name) is None else state[name] for name in COLUMNS])
        write_atomic(root / "sweep.csv", text.getvalue().encode())


# -- in words


def describe(plan: Plan, states: Mapping[Trial, State], since: float, processes: int) -> Iterator[str]:
    """The plan, line by line; `states` of its cells."""
    done = sum(state.get("status") == "done" for state in states.values())
    failed = sum(state.get("status") == "failed" for state in states.values())
    yield (
        f"{len(plan.trials)} cells, {done} of them done"
        + (f", {failed} failed before and tried again" if failed else "")
        + (f"; {len(plan.skipped)} skipped" if plan.skipped else "")
    )
    fractions: dict[float, list[tuple[int, int]]] = {}
    for (fraction, _), numbers in plan.sizes.items():
        fractions.setdefault(fraction, []).append(numbers)
    for fraction, numbers in fractions.items():
        labeled, unlabeled = (_span([number[n] for number in numbers]) for n in (0, 1))
        yield f"  {fraction:g} of the labels: {labeled} labeled, {unlabeled} unlabeled images"
    for method, model in dict.fromkeys((trial.method, trial.model) for trial in plan.trials):
        matching = [trial for trial in plan.trials if (trial.method, trial.model) == (method, model)]
        seeds = " ".join(dict.fromkeys(str(trial.seed) for trial in matching))
        shares = " ".join(dict.fromkeys(f"{trial.label_fraction:g}" for trial in matching))
        finished = sum(states[trial].get("status") == "done" for trial in matching)
        yield f"  {method}, {model}: fractions {shares}, seeds {seeds}: {len(matching)} cells, {finished} done"
    for method, fraction, reason in dict.fromkeys(
        (trial.method, trial.label_fraction, reason) for trial, reason in plan.skipped
    ):
        yield f"  skipped: {method} at {fraction:g} of the labels: {reason}"
    yield f"time to go: {time_left(plan.trials, states, since, processes)}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def time_left(trials: Sequence[Trial], states: Mapping[Trial, State], since: float, processes: int) -> str:
    """How long the rest will take, from what done cells of the same method took; in words."""
    took: dict[str, list[float]] = {}
    for trial in trials:
        if states[trial].get("status") == "done":
            took.setdefault(trial.method, []).append(states[trial].get("took", 0.0))
    remaining = [trial for trial in trials if not is_finished(states[trial], since)]
    unknown = dict.fromkeys(trial.method for trial in remaining if trial.method not in took)
    seconds = sum(sum(took[trial.method]) / len(took[trial.method]) for trial in remaining if trial.method in took)
    if not remaining:
        return "none"
    if len(unknown) == len({trial.method for trial in remaining}):
        return "not known yet, no cell like them is done"
    estimate = f"about {_duration(seconds / min(processes, len(remaining)))}"
    return f"{estimate} without {', '.join(unknown)}, not known yet" if unknown else estimate


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
