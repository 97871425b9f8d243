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
from kmine.io.files import UNFINISHED, read_json, user_errors, write_atomic, write_json
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RESUMABLE_CHANGES, RunStore
from kmine.sweep.trials import (
    Cell,
    State,
    config_of,
    data_of,
    folder_of,
    is_settled,
    state_of,
)

COLUMNS = (
    *("method", "model", "label_fraction", "seed", "status", "error", "run", "num_labeled", "num_unlabeled", "steps"),
    *("val_dice", "val_dice_final", "seconds", "peak_memory_mb", "num_parameters"),
)
VARIED = ("methods", "models", "fractions", "seeds", "set", "seed", "baseline", "model.name", "data.label_fraction")
HOW = ("processes", "backend", "address", "dry_run")
"""Settings that may differ when a sweep is taken up again: more cells may come, and how they are done changes none."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    cells: list[Cell]
    """In the order of the work: seed by seed, so that early rows are a small sweep of their own."""
    skipped: list[tuple[Cell, str]]
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
    cells, skipped = [], []
    masked = {ref.sample_id for ref in source.refs() if ref.has_mask}
    for seed, fraction, model, method in product(cfg.seeds, cfg.fractions, cfg.models, cfg.methods):
        cell, unlabeled = Cell(method, model, fraction, seed), splits[fraction, seed].unlabeled
        why = ""
        if method != "supervised" and not unlabeled:
            why = "nothing is unlabeled, so there is nothing but supervised"
        elif method == ORACLE and masked.isdisjoint(unlabeled):
            why = "no unlabeled image has a mask, so the oracle knows nothing"
        if why:
            skipped.append((cell, why))
        else:
            cells.append(cell)
    sizes = {key: (len(drawn.labeled), len(drawn.unlabeled)) for key, drawn in splits.items()}
    if not cells:
        raise UserError(f"nothing to do: {skipped[0][1]}; lower fractions, or add supervised to methods")
    return Plan(cells, skipped, sizes), source


def _refused_early(cfg: SweepConfig) -> Source:
    """The data set, once names and settings of all methods and models were looked at."""
    own, source = cfg.own_settings(), None
    for method, model in product(cfg.methods, cfg.models):
        loop = config_of(cfg, Cell(method, model, cfg.fractions[0], cfg.seeds[0]))
        if source is None or method in own or method == cfg.methods[0]:
            source = preflight(loop)
    assert source is not None, "there is at least one method and one model"
    return source


def _splits(cfg: SweepConfig, source: Source) -> Iterator[tuple[tuple[float, int], Splits]]:
    """The splits of each fraction and seed, as each cell will draw them."""
    data = cfg.data
    given = read_split(data.split_file, source)
    if given is not None and given.rows is not None:
        raise UserError(
            f"data.split_file {data.split_file}: expected who is for training, validation and test, got the splits of "
            "a run, which say who is labeled, too; a sweep draws that: give a table of sample_id,split"
        )
    cache = SampleCache(source, data.size, Path(data.cache_dir).expanduser() if data.cache_dir else None, data.on_error)
    refs = [ref for ref in cache.refs if given is None or ref.sample_id in given.sides]
    refs = list(merge_duplicates(refs, cache.hashes, data.duplicate_distance))  # slow for many images: once for all
    for fraction, seed in product(cfg.fractions, cfg.seeds):
        drawn = replace(data_of(cfg, fraction), duplicate_distance=-1)
        yield (fraction, seed), resolve_splits(drawn, seed, refs, cache.hashes, given)


# -- the folder


@contextmanager
def _alone(out: str | Path) -> Iterator[Path]:
    """The folder of the sweep, while no other process writes its table or takes it."""
    root = Path(out)
    with user_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".sweep.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def claim(cfg: SweepConfig, plan: Plan, source: Source) -> list[Cell]:
    """Take the folder for these settings and data, or refuse; all cells of the folder, those of earlier commands first.

    More methods, models, fractions and seeds may come to a sweep. One in which nothing was trained yet gives way.

    Raises:
        UserError: naming the field that differs.
    """
    with _alone(cfg.out) as root:
        if (root / "run.json").exists():
            raise UserError(f"{root} holds a run of kmine.loop; choose another --out")
        for path in root.glob(f".*{UNFINISHED}"):
            path.unlink()  # what a killed process left of a file it was writing
        was, cells, fingerprint = read_json(root / "sweep.json") or {}, [], source.fingerprint()
        if any(root.glob("cells/**/*.safetensors")):
            cells = [Cell(*values) for values in was.get("cells", [])]
            _refuse_other(cfg, root, was, cells)
            fingerprint = _same_data(cfg, root, str(was.get("data_fingerprint")), source, cells)
        cells += [cell for cell in plan.cells if cell not in cells]
        write_json(root / "sweep.json", {"data_fingerprint": fingerprint, "cells": [astuple(cell) for cell in cells]})
        write_atomic(root / "config.yaml", yaml.safe_dump(cli.to_dict(cfg), sort_keys=False).encode())
    return cells


def _refuse_other(cfg: SweepConfig, root: Path, was: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Refuse settings that are not those of the cells that are there."""
    try:
        before = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        old, new = cli.flat(before), cli.flat(cli.to_dict(cfg))
        own = replace(cfg, set=before["set"], models=list(dict.fromkeys(cell.model for cell in cells))).own_settings()
    except (OSError, AttributeError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{root}: expected the settings of a sweep in config.yaml; choose another --out") from error
    there = {name for cell in cells for name in (cell.method, cell.model)}
    for name, settings in [*own.items(), *cfg.own_settings().items()]:
        for key in settings if name in there else ():
            old[f"set {name}.{key}"] = own.get(name, {}).get(key)
            new[f"set {name}.{key}"] = cfg.own_settings().get(name, {}).get(key)
    for key in sorted(set(old) | set(new)):
        if key not in (*RESUMABLE_CHANGES, *VARIED, *HOW) and old.get(key) != new.get(key):
            raise UserError(
                f"{root} holds a sweep with {key} = {old.get(key)!r}, this command has {new.get(key)!r}; "
                "choose another --out, or give the same settings to resume"
            )


def _same_data(cfg: SweepConfig, root: Path, was: str, source: Source, cells: Sequence[Cell]) -> str:
    """The fingerprint that the sweep began with, where the files are the same or were copied; else refuse."""
    if was == source.fingerprint():
        return was
    for cell in cells:
        folder = folder_of(root, cell)
        held = (read_json(folder / "run.json") or {}).get("data_contents")
        if held is not None:
            from kmine.setup.open import contents

            # It is read, not held: another process may be at it.
            if contents(config_of(cfg, cell), source, RunStore(folder, follows=True)) == held:
                return was
            break
    raise UserError(
        f"{root}: the data are not those this sweep began with (fingerprint {source.fingerprint()[:12]}, "
        f"was {was[:12]}); choose another --out"
    )


def write_table(out: str | Path, cells: Sequence[Cell]) -> None:
    """Write sweep.csv anew, from what every cell says of itself: whoever writes last, no row is lost."""
    with _alone(out) as root:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cell in cells:
            state = state_of(root, cell)
            if state.get("status") in ("done", "failed"):
                state |= {"run": folder_of(root, cell).relative_to(root).as_posix()}
                writer.writerow(["" if state.get(name) is None else state[name] for name in COLUMNS])
        write_atomic(root / "sweep.csv", text.getvalue().encode())


# -- in words


def describe(plan: Plan, states: Mapping[Cell, State], since: float, processes: int) -> Iterator[str]:
    """The plan, line by line; `states` of its cells."""
    done = sum(state.get("status") == "done" for state in states.values())
    failed = sum(state.get("status") == "failed" for state in states.values())
    yield (
        f"{len(plan.cells)} cells, {done} of them done"
        + (f", {failed} failed before and tried again" if failed else "")
        + (f"; {len(plan.skipped)} skipped" if plan.skipped else "")
    )
    fractions: dict[float, list[tuple[int, int]]] = {}
    for (fraction, _), numbers in plan.sizes.items():
        fractions.setdefault(fraction, []).append(numbers)
    for fraction, numbers in fractions.items():
        labeled, unlabeled = (_span([number[n] for number in numbers]) for n in (0, 1))
        yield f"  {fraction:g} of the labels: {labeled} labeled, {unlabeled} unlabeled images"
    for method, model in dict.fromkeys((cell.method, cell.model) for cell in plan.cells):
        mine = [cell for cell in plan.cells if (cell.method, cell.model) == (method, model)]
        seeds = " ".join(dict.fromkeys(str(cell.seed) for cell in mine))
        shares = " ".join(dict.fromkeys(f"{cell.label_fraction:g}" for cell in mine))
        finished = sum(states[cell].get("status") == "done" for cell in mine)
        yield f"  {method}, {model}: fractions {shares}, seeds {seeds}: {len(mine)} cells, {finished} done"
    for method, fraction, why in dict.fromkeys((cell.method, cell.label_fraction, why) for cell, why in plan.skipped):
        yield f"  skipped: {method} at {fraction:g} of the labels: {why}"
    yield f"time to go: {time_left(plan.cells, states, since, processes)}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def time_left(cells: Sequence[Cell], states: Mapping[Cell, State], since: float, processes: int) -> str:
    """How long the rest will take, from what done cells of the same method took; in words."""
    took: dict[str, list[float]] = {}
    for cell in cells:
        if states[cell].get("status") == "done":
            took.setdefault(cell.method, []).append(states[cell].get("took", 0.0))
    left = [cell for cell in cells if not is_settled(states[cell], since)]
    unknown = dict.fromkeys(cell.method for cell in left if cell.method not in took)
    seconds = sum(sum(took[cell.method]) / len(took[cell.method]) for cell in left if cell.method in took)
    if not left:
        return "none"
    if len(unknown) == len({cell.method for cell in left}):
        return "not known yet, no cell like them is done"
    about = f"about {_duration(seconds / min(processes, len(left)))}"
    return f"{about} without {', '.join(unknown)}, not known yet" if unknown else about


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
