"""`data.folds`: ordinary runs one after the other, one for each fold and one on all masks, in a folder of their own.

OUT/folds.json  plan.json  test_table.md ...   fold-0/ fold-1/ ... all/   each a run folder
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmine.config import LoopConfig
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.io.errors import user_errors
from kmine.io.files import write_json
from kmine.io.json_file import load_json
from kmine.loop.engine import LoopResults, run_rounds
from kmine.setup.finished import ALL_MASKS, FOLDS, fold_runs
from kmine.types import ProgressReporter

PLAN = "plan.json"


def fold_settings(cfg: LoopConfig) -> dict[str, LoopConfig]:
    """Settings of each run of `data.folds` by the name of its folder, that on all masks last."""
    names = {n: f"fold-{n}" for n in range(cfg.data.num_runs - 1)} | {cfg.data.num_runs - 1: ALL_MASKS}
    return {
        name: replace(cfg, out=str(Path(cfg.out) / name), data=replace(cfg.data, fold=fold))
        for fold, name in names.items()
    }


def refuse_other_folder(cfg: LoopConfig) -> None:
    """Raise `UserError` if the folder `out` holds a run and `cfg` is of folds, or the reverse, or other folds."""
    root, num_folds = Path(cfg.out), cfg.data.num_runs - 1
    present = len(fold_runs(root))
    if present and present != num_folds:
        expected = f"data.folds {present}, of which this folder holds the runs"
        raise UserError(f"{root}: expected {expected}, got {num_folds or None}; pass that, or choose another --out")
    if num_folds and not present and (root / "run.json").exists():
        raise UserError(f"{root}: expected a folder for {num_folds} folds, found a run; choose another --out")


def run_folds(
    cfg: LoopConfig, progress: ProgressReporter, source: Source | None, plan: Mapping[str, Any] | None
) -> LoopResults | None:
    """Run or resume `run_rounds` for every fold, then for all masks, whose results are returned.

    Embeddings and decoded images are in caches that all share; what a run has finished is read back. `plan` is that of
    all runs together; each keeps a copy. Returns None in all processes of a launch but the first.

    Raises:
        UserError: as `run_rounds`.
    """
    root, runs = Path(cfg.out), fold_settings(cfg)
    with user_errors(root, cure="choose another --out"):
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / FOLDS, {"runs": [*runs]})
    if plan is not None:
        write_json(root / PLAN, dict(plan))
    elif source is not None and (root / PLAN).is_file():  # not by several processes of a launch
        plan = load_json(root / PLAN, "the plan of a run", "remove it, or choose another --out")
    results = None
    for number, (name, own) in enumerate(runs.items(), start=1):
        progress.log(f"run {number} of {len(runs)}: {name}")
        results = run_rounds(own, progress, source, plan)
    return results
