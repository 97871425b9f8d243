"""Plan of a sweep, its folder and its table sweep.csv, which is written from the states of the trials.

SWEEP/config.yaml   settings
      sweep.json    fingerprint of the data; trials in the order of the plan
      sweep.csv     a row for each trial that is done or failed, in that order
      cells/        see kmine.sweep.trials
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from kmine import cli
from kmine.config.sweep import LABELS_ONLY, ORACLE, SweepConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.resize import Resizer
from kmine.data.source import Source
from kmine.data.split_file import read_split, resolve_splits
from kmine.data.splits import Splits, merge_duplicates
from kmine.errors import UserError
from kmine.io.console import duration
from kmine.io.errors import user_errors
from kmine.io.files import UNFINISHED, lock, open_lock, read_json, write_atomic, write_csv, write_json
from kmine.io.yaml_file import read_yaml
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.store.settings import RESUMABLE_CHANGES, differ, filled
from kmine.sweep.trials import State, Trial, config_of, data_of, is_finished, share_of_labels, state_of, trial_dir

COLUMNS = (
    *("method", "model", "label_fraction", "seed", "status", "error", "run", "num_labeled", "num_unlabeled", "steps"),
    *("val_dice", "val_dice_final", "seconds", "peak_memory_mb", "num_parameters", "val_score"),
)
VARIED = ("methods", "models", "fractions", "seeds", "set", "seed", "baseline", "model.name", "data.label_fraction")
EXECUTION_SETTINGS = ("processes", "backend", "address", "dry_run")
"""Settings of the execution; they and `VARIED` may differ when a sweep is resumed."""


@dataclass(frozen=True)
class Plan:
    """Trials of a command."""

    trials: list[Trial]
    """In the order of training: seed by seed, so that the first rows are a complete small sweep."""
    skipped: list[tuple[Trial, str]]
    """Impossible trials and the reason."""
    sizes: dict[tuple[float, int], tuple[int, int]]
    """Numbers of labeled and unlabeled images by (label fraction, seed)."""


def make_plan(cfg: SweepConfig) -> tuple[Plan, Source]:
    """Plan a sweep and open its data set; images are decoded unless they are cached, masks are not.

    Raises:
        UserError: names, settings, data or splits that would fail every trial.
    """
    source = _preflight_all(cfg)
    splits = dict(_splits(cfg, source))
    trials, skipped = [], []
    masked = {ref.sample_id for ref in source.refs() if ref.has_mask}
    for seed, fraction, model, method in product(cfg.seeds, cfg.fractions, cfg.models, cfg.methods):
        trial, unlabeled = Trial(method, model, fraction, seed), splits[fraction, seed].unlabeled
        reason = ""
        if method not in LABELS_ONLY and not unlabeled:
            reason = f"nothing is unlabeled, so only {' and '.join(LABELS_ONLY)} are possible"
        elif method == ORACLE and masked.isdisjoint(unlabeled):
            reason = "no unlabeled image has a mask for the oracle"
        if reason:
            skipped.append((trial, reason))
        else:
            trials.append(trial)
    sizes = {key: (len(drawn.labeled), len(drawn.unlabeled)) for key, drawn in splits.items()}
    if not trials:
        raise UserError(f"nothing to do: {skipped[0][1]}; lower fractions, or add supervised to methods")
    return Plan(trials, skipped, sizes), source


def _preflight_all(cfg: SweepConfig) -> Source:
    """Check names and settings of all methods and models; returns the data set."""
    own, source = cfg.own_settings(), None
    for method, model in product(cfg.methods, cfg.models):
        loop = config_of(cfg, Trial(method, model, cfg.fractions[0], cfg.seeds[0]))
        if source is None or method in own or method == cfg.methods[0]:
            source = preflight(loop)
    assert source is not None, "there is at least one method and one model"
    return source


def _splits(cfg: SweepConfig, source: Source) -> Iterator[tuple[tuple[float, int], Splits]]:
    """Splits of each fraction and seed, as the trials will draw them."""
    data = cfg.data
    given_split = read_split(data.split_file, source)
    if given_split is not None and given_split.rows is not None:
        raise UserError(
            f"data.split_file {data.split_file}: expected training, validation and test images, got the splits of a "
            "run with its labeled images, which a sweep draws itself; give a table of sample_id,split"
        )
    cache = SampleCache(source, Resizer.of(data), data.cache_dir, data.on_error)
    refs = [ref for ref in cache.refs if given_split is None or ref.sample_id in given_split.sides]
    refs = list(merge_duplicates(refs, cache.hashes, data.duplicate_distance))  # slow for many images
    for fraction, seed in product(cfg.fractions, cfg.seeds):
        drawn = replace(data_of(cfg, fraction), duplicate_distance=-1)
        yield (fraction, seed), resolve_splits(drawn, seed, refs, cache.hashes, given_split)


# -- the folder


@contextmanager
def _locked(out: str | Path) -> Iterator[Path]:
    """Lock the folder of the sweep against other processes that claim it or write its table."""
    root = Path(out)
    with user_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        file = open_lock(root / ".sweep.lock")
    with file:
        lock(file, wait=True)
        yield root


def claim(cfg: SweepConfig, plan: Plan, source: Source) -> list[Trial]:
    """Claim the folder for these settings and data; returns all its trials, those of earlier commands first.

    Methods, models, fractions and seeds may be added. If nothing was trained yet, changed settings overwrite the old.

    Raises:
        UserError: other settings or data; names the field that differs.
    """
    with _locked(cfg.out) as root:
        if (root / "run.json").exists():
            raise UserError(f"{root} holds a run of kmine.loop; choose another --out")
        for path in root.glob(f".*{UNFINISHED}"):
            path.unlink()  # unfinished writes of a killed process
        previous, trials, fingerprint = read_json(root / "sweep.json") or {}, [], source.fingerprint()
        if any(root.glob("cells/**/*.safetensors")):
            trials = [Trial(*values) for values in previous.get("cells", [])]
            _refuse_other(cfg, root, previous, trials)
            fingerprint = _same_data(cfg, root, str(previous.get("data_fingerprint")), source, trials)
        trials += [trial for trial in plan.trials if trial not in trials]
        cells = [astuple(trial) for trial in trials]
        write_json(root / "sweep.json", {"data_fingerprint": fingerprint, "cells": cells})
        write_atomic(root / "config.yaml", yaml.safe_dump(cli.to_dict(cfg), sort_keys=False).encode())
    return trials


def _refuse_other(cfg: SweepConfig, root: Path, previous: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Raise `UserError` if the settings differ from those of the existing trials."""
    before = read_yaml(root / "config.yaml", str(root / "config.yaml"), "choose another --out")
    try:
        old, new = filled(cli.flat(before)), cli.flat(cli.to_dict(cfg))
        models = list(dict.fromkeys(trial.model for trial in trials))
        own = replace(cfg, set=before["set"], models=models).own_settings()
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{root}: expected the settings of a sweep in config.yaml; choose another --out") from error
    existing = {name for trial in trials for name in (trial.method, trial.model)}
    for values, settings in ((old, own), (new, cfg.own_settings())):
        own_values = {name: value for name, value in settings.items() if name in existing}
        values |= {f"set {name}": value for name, value in cli.flat(own_values).items()}
    for key in sorted(set(old) | set(new)):
        if key not in (*RESUMABLE_CHANGES, *VARIED, *EXECUTION_SETTINGS) and differ(old.get(key), new.get(key)):
            raise UserError(
                f"{root}/config.yaml: holds a sweep with {key} = {old.get(key)!r}, this command has {new.get(key)!r}; "
                "choose another --out, or give the same settings to resume"
            )


def _same_data(cfg: SweepConfig, root: Path, previous: str, source: Source, trials: Sequence[Trial]) -> str:
    """Fingerprint that the sweep began with, if the data are the same or copies; else raises `UserError`."""
    if previous == source.fingerprint():
        return previous
    for trial in trials:
        folder = trial_dir(root, trial)
        stored_contents = (read_json(folder / "run.json") or {}).get("data_contents")
        if stored_contents is not None:
            from kmine.setup.open import content_fingerprints

            # Without a lock: another process may be training there.
            if content_fingerprints(config_of(cfg, trial), source, RunFolder(folder, follows=True)) == stored_contents:
                return previous
            break
    raise UserError(
        f"{root}: the data are not those this sweep began with (fingerprint {source.fingerprint()[:12]}, "
        f"was {previous[:12]}); choose another --out"
    )


def write_table(out: str | Path, trials: Sequence[Trial]) -> None:
    """Write sweep.csv from the states of all trials, so that concurrent writers lose no row."""
    with _locked(out) as root:
        rows = []
        for trial in trials:
            state = state_of(root, trial)
            if state.get("status") in ("done", "failed"):
                state |= {"run": trial_dir(root, trial).relative_to(root).as_posix()}
                rows.append(["" if state.get(name) is None else state[name] for name in COLUMNS])
        write_csv(root / "sweep.csv", COLUMNS, rows)


# -- text


def describe(plan: Plan, states: Mapping[Trial, State], since: float, processes: int) -> Iterator[str]:
    """Lines that describe the plan; `states` are those of its trials."""
    count = Counter(state.get("status") for state in states.values())
    failed = f", {count['failed']} failed before and are retried" if count["failed"] else ""
    skipped = f"; {len(plan.skipped)} skipped" if plan.skipped else ""
    yield f"{len(plan.trials)} trials, {count['done']} of them done{failed}{skipped}"
    for fraction in dict.fromkeys(fraction for fraction, _ in plan.sizes):
        numbers = [numbers for key, numbers in plan.sizes.items() if key[0] == fraction]
        labeled, unlabeled = map(_span, zip(*numbers, strict=True))
        yield f"  {share_of_labels(fraction)}: {labeled} labeled, {unlabeled} unlabeled images"
    for method, model in dict.fromkeys((trial.method, trial.model) for trial in plan.trials):
        matching = [trial for trial in plan.trials if (trial.method, trial.model) == (method, model)]
        seeds = " ".join(dict.fromkeys(str(trial.seed) for trial in matching))
        shares = " ".join(dict.fromkeys(f"{trial.label_fraction:g}" for trial in matching))
        finished = sum(states[trial].get("status") == "done" for trial in matching)
        yield f"  {method}, {model}: fractions {shares}, seeds {seeds}: {len(matching)} trials, {finished} done"
    reasons = dict.fromkeys((trial.method, trial.label_fraction, reason) for trial, reason in plan.skipped)
    for method, fraction, reason in reasons:
        yield f"  skipped: {method} with {share_of_labels(fraction)}: {reason}"
    yield f"time left: {time_left(states, since, processes)}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def time_left(states: Mapping[Trial, State], since: float, processes: int) -> str:
    """Remaining time as text, estimated from finished trials of the same methods."""
    took: dict[str, list[float]] = {}
    for trial, state in states.items():
        if state.get("status") == "done":
            took.setdefault(trial.method, []).append(state.get("took", 0.0))
    remaining = [trial.method for trial, state in states.items() if not is_finished(state, since)]
    if not remaining:
        return "none"
    seconds = [sum(took[method]) / len(took[method]) for method in remaining if method in took]
    if not seconds:
        return "not known yet, no trial of these methods is done"
    estimate = f"about {duration(sum(seconds) / min(processes, len(remaining)))}"
    unknown = dict.fromkeys(method for method in remaining if method not in took)
    return f"{estimate} without {', '.join(unknown)}, not known yet" if unknown else estimate
