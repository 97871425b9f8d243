"""Ten more labels on Kvasir-SEG: chosen by `kmine next`, or at random.

    python experiments/next_labels/run.py OUT --root KVASIR --weights MOBILENET_V2
    python experiments/next_labels/run.py OUT --root KVASIR --weights MOBILENET_V2 --arms base chosen random uncertain
    python experiments/next_labels/run.py OUT_OR_CSV --table

Five folds, labeled and watched images and the settings of training are those of experiments/recipe/run.py, with the
fold's number as seed. Of each fold, a run of `kmine loop` with 60 labels mines the other images once (`tiny` without
adaptation; two fold models of half the steps calibrate the gate; one step of training follows), and `choose_next`,
the code of `kmine next`, chooses ten images. Their true masks are added to the labels, and a new model is trained from
scratch on 70 labels, without pseudo masks. All arms are scored on the images of the fold:

    base        60 labels: round 0 of the run
    chosen      70: ten of kmine next
    random      70: ten random unlabeled ones, one of a group of near-duplicates; random-2, ... draw others
    uncertain   70: ten of the highest gain, without regard to what they stand for

OUT/chosen/FOLD.csv has the images of each arm, OUT/cells/FOLD-ARM.csv the Dice of each scored image. What is there is
not repeated, a run resumes, and several processes can share OUT.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kmine.audit.evidence import load_round_model
from kmine.audit.next_images import choose_next, dropped_or_doubtful
from kmine.audit.rounds import open_audit
from kmine.config import LoopConfig
from kmine.config.mining import AdaptConfig
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.data.splits import merge_duplicates
from kmine.loop.engine import run_rounds
from kmine.models.base import LocalModel
from kmine.ops.seeding import derive_seed
from kmine.setup.open import open_cache

sys.path.append(str(Path(__file__).resolve().parents[1]))
import folds
from folds import NUM_FOLDS, parts_of
from recipe import run as recipe

NUM_LABELS, NUM_NEW, REFERENCE = 60, 10, "random"
SPLITS = {"labeled": "labeled", "others": "unlabeled", "checked": "val", "test": "test"}
"""Names of a fold's parts in splits.csv."""


class Fold:
    """One fold: its images, the run with 60 labels, and the choices."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        self.args, self.number = args, number
        self.cfg: LoopConfig = recipe.settings(args, "new", number)
        self.cache = open_cache(self.cfg, open_source(self.cfg.data))
        refs = merge_duplicates(self.cache.refs, self.cache.hashes, self.cfg.data.duplicate_distance)
        self.groups = {ref.sample_id: ref.group_id for ref in refs}
        self.parts = parts_of(self.groups, number, NUM_LABELS)
        self.run = args.out / "runs" / str(number)

    def pool(self, ids: Sequence[str]) -> Pool:
        return Pool(self.cache, ids, self.groups, "true")

    def mine(self) -> None:
        """The run of `kmine loop`, resumed where it stopped; its unlabeled images have no masks for it."""
        splits = self.args.out / "splits" / f"{self.number}.csv"
        splits.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted((i, self.groups[i], split) for part, split in SPLITS.items() for i in self.parts[part])
        pd.DataFrame(rows, columns=["sample_id", "group_id", "split"]).to_csv(splits, index=False)
        cfg = replace(
            self.cfg,
            **{"rounds": 1, "retrain": False, "baseline": False, "crossfit": 1, "plan": False, "out": str(self.run)},
            data=replace(self.cfg.data, split_file=str(splits)),
            segmenter=replace(self.cfg.segmenter, name=self.args.segmenter),
            adapt=AdaptConfig(enabled=False, folds=2, fold_steps=max(1, self.cfg.fit.steps // 2)),
            fit=replace(self.cfg.fit, round_steps=1),
        )
        run_rounds(cfg, recipe.Quiet())

    def choose(self) -> dict[str, list[str]]:
        """The new images of each arm with 70 labels; written once."""
        path = self.args.out / "chosen" / f"{self.number}.csv"
        if not path.exists():
            self.mine()
            with open_audit(self.run, recipe.Quiet(), device="cpu") as audited:
                chosen = choose_next(audited, NUM_NEW)
                pool, candidates = audited.task.unlabeled, dropped_or_doubtful(audited)
                every = choose_next(audited, len({pool.group_of(i) for i in candidates}))
            arms = {"chosen": chosen, "uncertain": sorted(every, key=lambda image: -image.gain)[:NUM_NEW]}
            rows = [(arm, *image) for arm, images in arms.items() for image in images]
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows, columns=["arm", *chosen[0]._fields]).to_csv(path.with_suffix(".tmp"), index=False)
            path.with_suffix(".tmp").rename(path)
            print(f"fold {self.number}: {len(candidates)} candidates of {len(pool)}", flush=True)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {arm: [row["sample_id"] for row in rows if row["arm"] == arm] for arm in ("chosen", "uncertain")}

    def new_ids(self, arm: str) -> list[str]:
        """Images that an arm labels in addition."""
        if not arm.startswith(REFERENCE):
            return self.choose()[arm]
        first = {self.groups[i]: i for i in reversed(self.parts["others"])}
        ids = sorted(first.values(), key=lambda i: derive_seed(arm, self.number, i))
        return ids[:NUM_NEW]

    def base_model(self) -> LocalModel:
        self.choose()
        with open_audit(self.run, recipe.Quiet(), device="cpu") as audited:
            return load_round_model(audited.task, number=0)

    def retrained(self, new: Sequence[str], arm: str) -> LocalModel:
        """A model trained from scratch on the labels and the new ones."""
        folder = self.args.out / "trainings" / f"{self.number}-{arm}"
        rest = [i for i in self.parts["others"] if i not in new]
        labeled, checked = self.pool([*self.parts["labeled"], *new]), self.pool(self.parts["checked"])
        pools = (labeled, Pool(self.cache, rest, self.groups), checked)
        return recipe.trained_model(self.cfg, pools, folder, f"{self.number} {arm}")

    def cell(self, arm: str) -> pd.DataFrame:
        """Train and score an arm."""
        began, new = time.perf_counter(), [] if arm == "base" else self.new_ids(arm)
        model = self.retrained(new, arm) if new else self.base_model()
        ids = self.parts["test"]
        dice, seconds = recipe.score(model, self.pool(ids)), round(time.perf_counter() - began, 1)
        print(f"fold {self.number}, {arm}: {np.mean(dice):.3f} on {len(ids)} images, {seconds:.0f} s", flush=True)
        where = {"arm": arm, "fold": self.number, "labels": NUM_LABELS + len(new), "seconds": seconds}
        rows = zip(ids, dice, strict=True)
        return pd.DataFrame([{**where, "sample_id": i, "group": self.groups[i], "dice": d} for i, d in rows])


def table(source: Path) -> str:
    """Markdown of the cells of a folder or CSV."""
    return folds.table([folds.read_cells(source)], REFERENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder; with --table also a CSV")
    parser.add_argument("--root", help="folder of Kvasir-SEG")
    parser.add_argument("--weights", help="MobileNetV2 encoder weights (.safetensors)")
    parser.add_argument("--arms", nargs="+", default=["base", "chosen", "random"])
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(NUM_FOLDS)))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--segmenter", default="tiny", help="that mines, not adapted")
    parser.add_argument("--table", action="store_true", help="print the table of a folder or CSV; trains nothing")
    args = parser.parse_args()
    if args.table:
        return print(table(args.out))
    torch.set_num_threads(1)
    fold = lru_cache(1)(partial(Fold, args))
    return folds.write_cells(args.out, args.folds, args.arms, lambda number, arm: fold(number).cell(arm))


if __name__ == "__main__":
    main()
