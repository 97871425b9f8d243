"""What `kmine predict` would estimate of validation images, and what their Dice is, in cells that `run.py` finished
without `--folds`.

    python experiments/mining_engine/estimates.py OUT --data.root FOLDER --weights MOBILENET_V2 --labels 30 --size 96

The cells' own models of the parts are read, nothing is trained, the cells are left as they are, and the test split is
never read. Prints one line a seed and one for all; OUT/estimates-LABELS-TTA.csv holds a row an image.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is no package
sys.path.insert(0, str(Path(__file__).parent))
from run import config, make_parser

from kmine.cli import Terminal
from kmine.mining.calibration import local_step as calibration_alone
from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.mining.crossfit import folds
from kmine.models.base import LocalModel
from kmine.ops import metrics
from kmine.setup.open import open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX

BELOW = 0.6
"""Estimates under this are looked at apart: what a person would be sent to look at first."""


def of_cell(args: argparse.Namespace, labels: float, seed: int, root: Path) -> pd.DataFrame:
    """A row for each validation image and test-time augmentation, of the adopted model of the arm `mining`."""
    cell = args.out / f"kvasir-{labels:g}-{seed}"
    cfg = config(args, labels, seed, "mining", root)
    store, terminal = RunFolder(root), Terminal(quiet=True)
    task = open_task(cfg, preflight(cfg), store, terminal)
    known = pd.read_csv(cell / "mining" / "splits.csv", dtype=str).set_index("sample_id")["split"]
    assert {i for i in known.index if known[i] == "labeled"} == set(task.labeled.ids), "the cell's own split"

    def model_of(folder: str) -> LocalModel:
        model = new_model(task)
        model.load_state_dict(store.load_tensors(cell / "mining" / folder / "model.safetensors", None)[0])
        return model

    def of_part(task: Task, number: int, part: Any) -> LocalModel:
        return model_of(f"fold_{number}/round_00")

    calibration_alone.fold_model = of_part  # those of the cell, whatever signs them
    about = calibration_alone.calibrate_local_quality(task, folds(task.labeled, cfg.adapt.folds, cfg.seed))
    alone = LocalQualityEstimator.from_json(about or {"by_tta": {}})
    model = model_of(f"round_{int(pd.read_csv(cell / 'mining.csv')['adopted_round'].iloc[0]):02d}")
    rows = []
    for tta in alone.calibrators:
        for probs in infer(model, task.val, task.val.ids, batch_size=16, tta=tta, device=task.fabric.device):
            truth = task.val.sample(probs.sample_id).mask
            valid = truth != IGNORE_INDEX
            found = alone.estimates(probs, tta)
            areas = [np.count_nonzero(one.component) for one, _ in found]
            estimate = np.average([value for _, value in found], weights=areas) if found else np.nan
            dice = metrics.dice((probs.mask > 0) & valid, (truth > 0) & valid)
            rows.append({"tta": tta, "seed": seed, "image": probs.sample_id, "estimate": estimate, "dice": dice})
    store.close()
    terminal.stop()
    return pd.DataFrame(rows)


def said(frame: pd.DataFrame) -> str:
    """Of images with an estimate."""
    k = frame.dropna()
    low, bad = k[k["estimate"] < BELOW], k["dice"] < 0.5
    pairs = k["estimate"].to_numpy()[~bad][:, None] - k["estimate"].to_numpy()[bad][None]
    auc = ((pairs > 0) + 0.5 * (pairs == 0)).mean() if pairs.size else np.nan
    rho = spearmanr(k["estimate"], k["dice"]).statistic
    return (
        f"{len(k)} of {len(frame)} images, rank correlation {rho:.3f}, mean estimate {k['estimate'].mean():.3f}, mean "
        f"Dice {k['dice'].mean():.3f}, mean error {(k['estimate'] - k['dice']).abs().mean():.3f}; below {BELOW}: "
        f"{len(low)} of Dice {low['dice'].mean():.3f}, others {k[k['estimate'] >= BELOW]['dice'].mean():.3f}; "
        f"Dice under .5: {bad.sum()}, AUC {auc:.3f}"
    )


def main() -> None:
    """See the top of the file."""
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    for labels in args.labels:
        frames = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                frames.append(of_cell(args, labels, seed, Path(folder)))
        for tta, frame in pd.concat(frames).groupby("tta", sort=False):
            for seed, of_seed in frame.groupby("seed"):
                print(f"{labels:g} labels, tta {tta}, seed {seed}: {said(of_seed)}", flush=True)
            print(f"{labels:g} labels, tta {tta}, all: {said(frame)}", flush=True)
            frame.to_csv(args.out / f"estimates-{labels:g}-{tta}.csv", index=False)


if __name__ == "__main__":
    main()
