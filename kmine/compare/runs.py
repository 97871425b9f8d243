"""Finished runs and trials of sweeps to compare. Nothing here opens a test split."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.errors import UserError
from kmine.io.errors import expanded
from kmine.io.yaml_file import read_yaml
from kmine.setup.finished import FinishedRun, fold_runs, open_finished_run
from kmine.store.run_folder import RunFolder
from kmine.store.settings import RESUMABLE_CHANGES, filled

SWEEP_TABLE = "sweep.csv"
SWEEP_COLUMNS = ("method", "model", "label_fraction", "seed", "status", "run")
"""Required columns; the others are costs."""
MAY_DIFFER = {*RESUMABLE_CHANGES, "seed", "data.label_fraction", "data.fine_groups", "data.split_file", "data.fold"}
"""Settings in which runs of one table may differ; their splits are compared instead."""
FOLDS_NOTE = (
    "{name}: {count} folds. Each image with a mask is tested once, by models that were not trained on it. Intervals "
    "omit that the folds share most of their training images. The run on all masks ({name}/all) is not tested itself."
)


@dataclass(frozen=True)
class ComparedRun(FinishedRun):
    """A finished run, or a finished trial of a sweep."""

    settings: Mapping[str, Any]
    """Content of config.yaml by dotted name."""
    splits: Sequence[Mapping[str, str]]
    """Rows of splits.csv."""
    trial: Mapping[str, str] | None
    """Row of sweep.csv; None for a run of kmine.loop."""
    folds: Sequence[ComparedRun] = ()
    """Of a fold, the runs of all folds of its folder."""

    @property
    def test_ids(self) -> list[str]:
        """Ids of the test split, of a fold those of all folds together, sorted."""
        parts = [run.splits for run in self.folds] or [self.splits]
        return sorted(row["sample_id"] for rows in parts for row in rows if row["split"] == "test")

    @property
    def name(self) -> str:
        """The folder that tables name: of a fold, that of all folds."""
        return str(self.root.parent if self.folds else self.root)

    @property
    def model_fraction_seed(self) -> tuple[str, float, int]:
        """Model, label fraction (or number of labeled groups) and seed."""
        if self.trial is not None:
            return self.trial["model"], float(self.trial["label_fraction"]), int(self.trial["seed"])
        data = self.cfg.data
        fraction = data.label_fraction if data.fine_groups is None else data.fine_groups
        return self.cfg.model.name, fraction, self.cfg.seed


def find_runs(paths: Sequence[str | Path], device: str, data_root: str | None) -> tuple[list[ComparedRun], list[str]]:
    """Open runs, the folds of folders of folds and the finished trials of sweeps; returns them and notes on them.

    Raises:
        UserError: a folder that holds neither, an unfinished run, a sweep without finished trials, damaged files.
    """
    runs, notes = [], []
    for path in map(expanded, paths):
        if folders := fold_runs(path):
            folds = [_open(folder, None, device, data_root) for folder in folders]
            runs += [replace(fold, folds=folds) for fold in folds]
            notes.append(FOLDS_NOTE.format(count=len(folds), name=path.name))
            continue
        if not (path / SWEEP_TABLE).is_file():
            runs.append(_open(path, None, device, data_root))
            continue
        rows = _read_sweep(path / SWEEP_TABLE)
        done = [row for row in rows if row["status"] == "done"]
        if not done:
            raise UserError(f"{path}: none of the {len(rows)} trials of {SWEEP_TABLE} is done; run kmine.sweep again")
        if len(done) < len(rows):
            notes.append(f"{len(rows) - len(done)} of {len(rows)} trials of {path.name} failed and are left out.")
        runs += [_open(path / row["run"], row, device, data_root) for row in done]
    return runs, notes


def _read_sweep(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected the table of a sweep, cannot read it ({error}); run kmine.sweep") from error
    for row in rows:
        missing = [name for name in SWEEP_COLUMNS if row.get(name) is None]
        if missing:
            raise UserError(f"{path}: expected the columns {', '.join(SWEEP_COLUMNS)}, {missing[0]} is missing")
        try:
            float(row["label_fraction"]), int(row["seed"])
        except ValueError as error:
            raise UserError(f"{path}: expected numbers for label_fraction and seed ({error}); mend that row") from error
    return rows


def _open(path: Path, trial: Mapping[str, str] | None, device: str, data_root: str | None) -> ComparedRun:
    finished = open_finished_run(path, device=device, data_root=data_root)
    method = finished.info.get("method")
    if trial is not None and method != trial["method"]:
        raise UserError(
            f"{path}: expected a run of {trial['method']}, as {SWEEP_TABLE} says; run.json says {method}; "
            "run kmine.sweep again"
        )
    splits = RunFolder(path, follows=True).read_csv("splits.csv")
    if splits is None:
        raise UserError(f"{path / 'splits.csv'}: expected the run's splits, the file is missing; restore it")
    settings = filled(cli.flat(read_yaml(path / "config.yaml", str(path / "config.yaml"), "restore that file")))
    return ComparedRun(path, finished.info, finished.cfg, settings, splits, trial)


def refuse_mixtures(runs: Sequence[ComparedRun]) -> None:
    """Raise `UserError` for runs that do not belong in one table: other data, test split or settings."""
    loop_runs = [run for run in runs if run.trial is None]
    for other in runs:
        reference, differing = runs[0], _differing_data(runs[0], other)
        if other.trial is None and not differing:
            same_model = [run for run in loop_runs if run.cfg.model.name == other.cfg.model.name]
            reference = same_model[0] if other is not same_model[0] else loop_runs[0]
            differing = _differing_setting(reference.settings, other.settings)
        if differing:
            raise UserError(f"{other.root} and {reference.root} differ in {differing}; compare them one at a time")


def _differing_data(reference: ComparedRun, other: ComparedRun) -> str:
    images = [run.info.get("data_contents", {}).get("images") for run in (reference, other)]
    are_copies = images[0] is not None and images[0] == images[1]
    if reference.info.get("data_fingerprint") != other.info.get("data_fingerprint") and not are_copies:
        return "data"
    return "" if reference.test_ids == other.test_ids else "test split"


def _differing_setting(reference: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """First differing setting of both as text; settings of a model count only if both runs have that model."""
    other_model = reference.get("model.name") != other.get("model.name")
    for name in sorted(reference.keys() & other.keys() - MAY_DIFFER):
        own = name.startswith(("model.", "classifier.")) and other_model
        if reference[name] != other[name] and not own:
            return f"{name} ({reference[name]!r} and {other[name]!r})"
    return ""
