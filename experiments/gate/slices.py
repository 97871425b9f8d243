"""What the agreement of neighbouring slices adds to the gate's estimates, on volumes.

    python experiments/gate/slices.py OUT --data.root LITS --weights MOBILENET_V2 --task liver tumour

Calibrates the gate as `kmine loop` does, with the masks of all volumes but those of validation and test: fold models
and fold segmenters score volumes that they were not trained on. The estimates of the gate are then fitted twice on the
same objects, with `slice_dice` and without it, each volume by calibrators that lack it, and held against true Dice:
Spearman's correlation within each volume, and over all objects. What is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kmine.cli import Terminal
from kmine.config import AdaptConfig, DataConfig, FitConfig, LoopConfig, ModelConfig, SegmenterConfig
from kmine.mining.adaptation.step import adapt_segmenter
from kmine.mining.calibration.fit import fit_gate, rank_correlation
from kmine.mining.calibration.step import calibrate
from kmine.ops.calibrator import evidence_from_row
from kmine.setup.open import open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder

sys.path.append(str(Path(__file__).resolve().parents[1]))
from folds import t_interval

FEWEST = 10
"""Objects of a volume whose correlation is counted."""


def calibrated_rows(args: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Evidence and Dice of the labeled objects."""
    data = DataConfig(
        name="lits", root=args.root, task=task, slices="all" if task == "liver" else "liver", size=args.size,
        label_fraction=1.0, val_fraction=0.1, test_fraction=0.1, every_nth=args.every_nth, duplicate_distance=-1,
    )  # fmt: skip
    cfg = LoopConfig(
        out=str(args.out / task),
        seed=args.seed,
        data=data,
        model=ModelConfig("unetpp", "mobilenet_v2", args.weights),
        fit=FitConfig(steps=args.steps),
        adapt=AdaptConfig(folds=args.folds),
        segmenter=SegmenterConfig(name=args.segmenter),
    )
    folder = args.out / task / "calibration"
    if not (folder / "calibration.json").is_file():
        source, store, terminal = preflight(cfg), RunFolder(args.out / task), Terminal()
        opened = open_task(cfg, source, store, terminal)
        calibrate(adapt_segmenter(opened), opened.segmenter)
        store.close()
        terminal.stop()
    folds = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("fold_*.json"))]
    return [row for fold in folds for row in fold["objects"]]


def correlations(rows: Sequence[dict[str, Any]], seed: int, *, slices: bool) -> dict[str, float]:
    """Spearman's correlation of estimated with true Dice by volume, and over `all` objects."""
    evidence = [evidence_from_row(row) for row in rows]
    evidence = evidence if slices else [replace(e, slice_dice=float("nan")) for e in evidence]
    dice = [np.array([row[f"dice_{name}"] for row in rows], float) for name in ("segmenter", "local")]
    groups = np.array([row["group_id"] for row in rows])
    fitted = fit_gate(evidence, (dice[0], dice[1]), list(groups), margin=0.0, seed=seed)
    if fitted is None:
        raise SystemExit(f"{len(rows)} objects in {len({*groups})} volumes are too few to fit the gate's estimates")
    truth = np.where(fitted.sides < 0, dice[1], dice[0])
    names = [name for name in sorted({*groups}) if (groups == name).sum() >= FEWEST]
    found = {name: rank_correlation(fitted.estimates[groups == name], truth[groups == name]) for name in names}
    return found | {"all": rank_correlation(fitted.estimates, truth)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the correlations of each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data.root", dest="root", required=True, help="folder with volumes and segmentations")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors")
    parser.add_argument("--task", nargs="+", choices=("liver", "tumour"), default=["liver", "tumour"])
    parser.add_argument("--segmenter", default="tiny+adapted")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--every_nth", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for task in args.task:
        rows = calibrated_rows(args, task)
        without, beside = (correlations(rows, args.seed, slices=slices) for slices in (False, True))
        gains = np.array([beside[name] - without[name] for name in beside if name != "all"])
        gains = gains[np.isfinite(gains)]
        low, high = t_interval(gains)
        means = [np.nanmean([value for name, value in of.items() if name != "all"]) for of in (without, beside)]
        print(
            f"{task}: {len(rows)} objects; within volumes ({len(gains)}) {means[0]:.3f} without neighbouring slices, "
            f"{means[1]:.3f} with them, {gains.mean():+.3f} [{low:+.3f}, {high:+.3f}]; "
            f"over all objects {without['all']:.3f} and {beside['all']:.3f}"
        )


if __name__ == "__main__":
    main()
