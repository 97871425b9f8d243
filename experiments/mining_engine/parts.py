"""What each part of mining is worth: the pseudo masks of round 1 with one part at a time switched off, or on.

    python experiments/mining_engine/parts.py OUT --data.root FOLDER --weights MOBILENET_V2 --labels 15 60
    python experiments/mining_engine/parts.py OUT --table    # also of the file parts.csv

OUT may be that of run.py, whose round 0 and fold models are then taken over; they are trained once a cell (fold, number
of labels). Nothing is trained on the pseudo masks: their withheld truth says what they would teach, on the same images
for all parts of a cell. OUT/CELL/parts/SEGMENTER-PART-images.csv holds a row an image. With `--segmenters simulated`
the segmenter knows the truth (box IoU .85 whatever the prompt), so that prompts cannot help it, only which objects they
reach.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is no package
sys.path.insert(0, str(Path(__file__).parent))
from folds import is_locked, t_interval
from run import audit, config, keep_fingerprint, make_parser, on_fold, simulated, take_over

from kmine.cli import Terminal
from kmine.config import LoopConfig
from kmine.methods.mining import pseudo_label
from kmine.mining.adaptation.step import adapt_segmenter
from kmine.mining.calibration.step import calibrate, evidence_rows, fit_calibration
from kmine.mining.candidates import median_object_area
from kmine.mining.context import RoundContext
from kmine.ops import metrics
from kmine.ops.calibrator import Calibration
from kmine.setup.open import open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train

WHOLE = "whole"
PARTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    WHOLE: {},
    "no_gate": {"gate": {"mode": "ranked", "keep": 1.0}},
    "no_calibration": {"gate": {"mode": "ranked"}},
    "no_adaptation": {"adapt": {"enabled": False}},
    "true_boxes": {"adapt": {"folds": 1}},
    "no_jitters": {"prompts": {"num_jitters": 0}},
    "no_mask_prompt": {"prompts": {"mask_hint": False}},
    "no_refinement": {"refine": {"min_vote": 0.501, "ask_local": False, "doubt": None}},
    "no_doubt": {"refine": {"doubt": None}},
    "two_passes": {"prompts": {"passes": 2}},
    "points": {"prompts": {"points": True}},
    "three_boxes": {"prompts": {"box_scales": (1.0, 1.2, 1.5)}},
    "prompts_in_doubt": {"prompts": {"doubtful": 0.2}},
    "auto": {"prompts": {"source": "auto"}},
    "on_validation": {},
}
"""Settings that differ from the defaults, by section. `true_boxes` adapts the segmenter with jittered true boxes, not
with prompts of models that were not trained on an image; for `on_validation` see `calibrated_on_validation`. Source
`cascade` differs from round 2 on: not here."""

PROMPTS_ONLY = ("no_adaptation", "true_boxes", "no_mask_prompt", "two_passes", "points", "three_boxes")
"""Of no effect on the simulated segmenter."""


def with_part(cfg: LoopConfig, part: str) -> LoopConfig:
    """The settings with those of a part."""
    return replace(cfg, **{name: replace(getattr(cfg, name), **values) for name, values in PARTS[part].items()})


def calibrated_on_validation(task: Task, student: Checkpoints) -> Task:
    """The task with a gate calibrated on the objects that round 0 finds in the validation images; no part of kmine."""
    model = new_model(task)
    model.load_state_dict(student.best)
    area_prior = median_object_area(task.labeled, task.num_classes)
    pool = replace(task, labeled=task.val)  # whose masks `evidence_rows` compares with
    rows = list(
        evidence_rows(RoundContext(pool, model.eval(), None, task.segmenter, task.val, area_prior), task.val.ids)
    )
    cfg = task.cfg.gate
    record = fit_calibration(rows, cfg.target_dice, cfg.confidence, cfg.margin, task.cfg.seed)
    return replace(task, calibration=Calibration.from_json(record) if record["promise"] else None)


def run_part(args: argparse.Namespace, labels: float, fold: int, segmenter: str, part: str, cell: Path) -> None:
    """Mine `args.images` unlabeled images of a cell, and write what their pseudo masks are worth."""
    folder = cell / "parts"
    stem = folder / f"{segmenter}-{part}"
    root = stem.with_suffix(".part")
    shutil.rmtree(root, ignore_errors=True)  # of one that was stopped
    take_over(root, cell)
    args.segmenter = "tiny" if segmenter == "simulated" else segmenter
    cfg = on_fold(with_part(config(args, labels, fold, "mining", root), part), labels, fold, cell)
    source, store, terminal = preflight(cfg), RunFolder(root), Terminal(quiet=True)
    keep_fingerprint(store, source)
    task = open_task(cfg, source, store, terminal)
    model = new_model(task)
    student = train(task, model, round_idx=0)
    if segmenter == "simulated":
        base = simulated(task, source, args.iou)
        task = calibrate(replace(task, segmenter=base), base)
    else:
        task = calibrate(adapt_segmenter(task), task.segmenter)
    task = calibrated_on_validation(task, student) if part == "on_validation" else task
    some = np.random.default_rng(0).permutation(task.unlabeled.ids)[: args.images].tolist()
    task = replace(task, unlabeled=task.unlabeled.subset(sorted(some)))
    pseudo_label(task, model, student, None, 1)
    audit(task, source, [1], stem)
    store.close()
    terminal.stop()
    if part == WHOLE:
        root.rename(stem.with_suffix(".run"))  # for the others to take over
    else:
        shutil.rmtree(root)


def read(source: Path) -> pd.DataFrame:
    """Rows of the file parts.csv, or of all cells of OUT."""
    if source.is_file():
        return pd.read_csv(source, dtype={"sample_id": str})
    found = []
    for path in sorted(source.glob("*-*-*/parts/*-images.csv")):
        data, labels, fold = path.parents[1].name.split("-")
        segmenter, name = path.name.removesuffix("-images.csv").split("-", 1)
        about = {"set": data, "labels": float(labels), "fold": int(fold), "segmenter": segmenter, "part": name}
        found.append(pd.read_csv(path, dtype={"sample_id": str}).assign(**about))
    if not found:
        raise SystemExit(f"{source}: expected a finished cell or parts.csv, found none")
    return pd.concat(found, ignore_index=True)


COLUMNS = ("set, labels", "segmenter", "part", "folds", "images that teach", "their Dice", "lesion taught",
           "wrong taught", "corrected / newly broken", "minus whole: corrected − broken", "lesion taught",
           "wrong taught")  # fmt: skip


def measures(rows: pd.DataFrame) -> dict[str, float]:
    """Of the images of a cell: shares of the lesion's pixels and, of the rest, of the local model's wrong ones."""
    wrong = rows["wrong"].sum()
    changes = metrics.Correction(*(int(rows[name].sum()) for name in metrics.Correction._fields))
    corrected, broken = changes.shares
    return {
        "coverage": rows["in_training"].mean(),
        "dice": rows["dice_pseudo"].mean(),
        "lesion": rows["lesion_taught"].sum() / rows["lesion"].sum(),
        "wrong": rows["wrong_taught"].sum() / wrong,
        "corrected": corrected,
        "broken": broken,
        "net": corrected - broken,
    }


def table(source: Path) -> str:
    """Markdown: means over folds, and paired differences to the whole with their interval over folds."""
    rows = read(source)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for (data, labels, segmenter), of_segmenter in rows.groupby(["set", "labels", "segmenter"], sort=False):
        by_part = {
            part: pd.DataFrame({fold: measures(own) for fold, own in found.groupby("fold")}).T
            for part, found in of_segmenter.groupby("part")
        }
        for part in (part for part in PARTS if part in by_part):
            own, whole = by_part[part], by_part.get(WHOLE)
            mean = own.mean()
            values = [f"{mean[name]:.3f}" for name in ("coverage", "dice", "lesion", "wrong")]
            values.append(f"{mean['corrected']:.2f} / {mean['broken']:.2f}")
            gaps = ["–"] * 3
            if part != WHOLE and whole is not None:
                gaps = [_gap((own[name] - whole[name]).dropna()) for name in ("net", "lesion", "wrong")]
            cells = (f"{data}, {labels:g}", segmenter, part, str(len(own)), *values, *gaps)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(values: pd.Series) -> str:
    low, high = t_interval(values)
    return f"{values.mean():+.3f}" + ("" if np.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")


def cells(args: argparse.Namespace) -> Iterator[tuple[float, int, str, str, Path]]:
    """What is to do, the whole first in each cell; a cell that another process has is left to it."""
    for labels, fold in product(args.labels, args.seeds):
        cell = args.out / f"{args.set}-{labels:g}-{fold}"
        (cell / "parts").mkdir(parents=True, exist_ok=True)
        with (cell / "parts" / "lock").open("w") as lock:
            for segmenter, part in product(args.segmenters, args.parts) if is_locked(lock) else ():
                if segmenter != "simulated" or part not in PROMPTS_ONLY:
                    yield labels, fold, segmenter, part, cell


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--segmenters", nargs="+", default=["simulated", "tiny"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=120, help="unlabeled images that are mined in a cell")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and mine nothing")
    parser.add_argument("--csv", type=Path, help="also write all rows into this file")
    args = parser.parse_args(argv)
    for labels, fold, segmenter, part, cell in () if args.table else cells(args):
        done = cell / "parts" / f"{segmenter}-{part}-images.csv"
        if not done.exists():
            run_part(args, labels, fold, segmenter, part, cell)
            print(f"{cell.name} {segmenter}: {part}", flush=True)
    if args.csv:
        read(args.out).to_csv(args.csv, index=False, float_format="%.4f")
    print(table(args.out))


if __name__ == "__main__":
    main()
