"""What helps to learn from pseudo masks: one training round, one set of pseudo masks, one ingredient at a time.

    python experiments/ingredients/run.py OUT --data.root FOLDER_THAT_HOLDS_Kvasir-SEG --weights MOBILENET_V2 \\
        --labels 30 60 --seeds 0 1 2
    python experiments/ingredients/run.py OUT --table

For each number of labels and seed, round 0 is trained and the unlabeled images are mined once, as `kmine loop` does it
with the defaults. Every arm then starts from that round 0 and trains one more round, of as many steps and on the very
same pseudo masks; `supervised` and `supervised_all` train on the labels alone, the latter with those ingredients that
need no pseudo mask. A cell (labels, arm, seed) writes its Dice on the validation and the test images to
OUT/LABELS-ARM-SEED.csv, of the checkpoint that validation chose and of the last step; cells that are there are not
repeated, and a training that was stopped goes on. No round is refused here: what an arm comes to is what is asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kmine.cli import Terminal
from kmine.config import (
    AdaptConfig,
    DataConfig,
    FitConfig,
    LoopConfig,
    ModelConfig,
    SegmenterConfig,
)
from kmine.methods.mining import mine
from kmine.mining.adaptation.step import adapt_segmenter
from kmine.mining.calibration.step import calibrate
from kmine.mining.pseudo_labels import PseudoLabels
from kmine.mining.threshold import round_signature
from kmine.ops.statistics import paired_difference, score_empty_cases
from kmine.setup.open import open_for_test, open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.evaluation import evaluate_checkpoint
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import IGNORE_INDEX

INGREDIENTS: dict[str, dict[str, Any]] = {
    "strong": {"strong_augment": True},
    "cutmix": {"cutmix": 0.5},
    "feature_perturbation": {"feature_perturbation": 0.5},
    "ema": {"ema_decay": 0.99},
}
WAYS: dict[str, dict[str, Any]] = {
    "weights": {"pseudo_weight": "estimated"},
    "few_labels": {"labeled_share": 0.25},
    "many_labels": {"labeled_share": 0.75},
    "no_ignore": {},
}
"""Not part of `all`. In `no_ignore`, pixels that mining leaves open (255) teach background."""
ALL = {name: value for settings in INGREDIENTS.values() for name, value in settings.items()}
ARMS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "supervised_all": ALL,
    "none": {},
    **INGREDIENTS,
    "all": ALL,
    **WAYS,
}


def config(args: argparse.Namespace, labels: int, seed: int) -> LoopConfig:
    """Of round 0 and of the mining, shared by the arms."""
    return LoopConfig(
        rounds=1,
        seed=seed,
        out=str(args.out / "runs" / f"{labels}-{seed}"),
        data=DataConfig(
            name="kvasir_seg", root=args.root, size=args.size, fine_groups=labels, split_seed=0, cache_dir=args.cache
        ),
        model=ModelConfig(encoder="mobilenet_v2", encoder_weights=args.weights),
        fit=FitConfig(steps=args.steps, round_steps=args.round_steps, round_lr=args.round_lr, val_every=args.val_every),
        segmenter=SegmenterConfig(name=args.segmenter),
        adapt=AdaptConfig(enabled=args.adapt),
        retrain=False,
    )


def cells(args: argparse.Namespace, labels: int, seed: int, wanted: dict[str, Path]) -> None:
    """Mine once, then train and test every arm that is `wanted`."""
    cfg = config(args, labels, seed)
    source, store, terminal = preflight(cfg), RunFolder(Path(cfg.out)), Terminal()
    task = open_task(cfg, source, store, terminal)
    task = calibrate(adapt_segmenter(task), task.segmenter)
    rounds = list(mine(task))  # the last of them is the arm `none`
    if not rounds[-1].num_pseudo:
        raise SystemExit(f"{labels} labels, seed {seed}: nothing was mined; more --steps, or another segmenter")
    test = open_for_test(cfg, source, store)
    settings = {"batch_size": test.batch_size, "fabric": test.fabric}
    for arm, path in wanted.items():
        best, final = trained(task, arm)
        rows = [
            {"split": split, "checkpoint": checkpoint, "sample_id": case.sample_id, "dice": case.dice}
            for split, pool in (("val", task.val), ("test", test.pool))
            for checkpoint, weights in (("chosen", best), ("final", final))
            for case in evaluate_checkpoint(pool, test.model, weights, **settings).cases
        ]
        about = {"labeled": len(task.labeled), "pseudo": rounds[-1].num_pseudo, "segmenter": task.segmenter.name}
        frame = pd.DataFrame(rows).assign(**about)
        unfinished = path.with_suffix(".part")
        frame.to_csv(unfinished, index=False)
        unfinished.replace(path)
        print(f"{path.stem}: test Dice {_mean(frame, 'test'):.3f}, validation {_mean(frame, 'val'):.3f}", flush=True)
    store.close()
    terminal.stop()


def trained(task: Task, arm: str) -> tuple[Any, Any]:
    """Both checkpoints of an arm's round 1, from the round 0 and the pseudo masks that all share."""
    model = new_model(task)
    start = train(task, model, round_idx=0)  # read back
    varied = replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, **ARMS[arm])))
    pseudo = None if arm.startswith("supervised") else PseudoLabels(varied, 1, "", task.run.decisions(1)).pool
    signature = round_signature(task, start) if pseudo else ""
    if pseudo and arm == "no_ignore":
        pseudo, signature = (
            pseudo.with_masks(pseudo.ids, lambda i: _closed(task.run.pseudo_mask(1, i))),
            signature + arm,
        )
    found = train(
        varied,
        model,
        round_idx=1,
        start=start,
        pseudo=pseudo,
        pseudo_signature=signature,
        method_dir="" if arm == "none" else arm,
    )
    return found.best, found.final


def _closed(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(mask == IGNORE_INDEX, 0, mask).astype(np.uint8)


def _mean(frame: pd.DataFrame, split: str, checkpoint: str = "chosen") -> float:
    return frame[(frame["split"] == split) & (frame["checkpoint"] == checkpoint)]["dice"].mean()


def table(out: Path) -> str:
    """Markdown: per number of labels each arm's means, and the paired difference on the test images to `none`."""
    found = {tuple(path.stem.split("-")): pd.read_csv(path) for path in sorted(out.glob("*-*-*.csv"))}
    lines = ["| labels | arm | seeds | test Dice | sd over seeds | last step | validation | test, minus none |"]
    lines.append("|---" * 8 + "|")
    for labels, arm in product(sorted({key[0] for key in found}, key=int), ARMS):
        frames = {seed: found[n, name, seed] for n, name, seed in found if (n, name) == (labels, arm)}
        if not frames:
            continue
        tests = [_mean(frame, "test") for frame in frames.values()]
        sd = f"{np.std(tests, ddof=1):.3f}" if len(tests) > 1 else "–"
        means = [np.mean([_mean(f, *which) for f in frames.values()]) for which in (("test", "final"), ("val",))]
        beside = {seed: found[labels, "none", seed] for seed in frames if (labels, "none", seed) in found}
        gap = _difference(beside, frames) if beside and arm != "none" else "–"
        figures = " | ".join(f"{mean:.3f}" for mean in means)
        lines.append(f"| {labels} | {arm} | {len(frames)} | {np.mean(tests):.3f} | {sd} | {figures} | {gap} |")
    segmenters = sorted({frame["segmenter"].iloc[0] for frame in found.values()})
    return "\n".join([*lines, "", f"Segmenter: {', '.join(segmenters)}."])


def _difference(none: dict[str, pd.DataFrame], arm: dict[str, pd.DataFrame]) -> str:
    """Over the seeds that have both, paired by seed and test image."""

    def grid(frames: dict[str, pd.DataFrame]) -> np.ndarray:
        chosen = [f[(f["split"] == "test") & (f["checkpoint"] == "chosen")].sort_values("sample_id") for f in frames]
        return score_empty_cases(np.stack([frame["dice"].to_numpy(float) for frame in chosen]))

    gap = paired_difference(grid(list(none.values())), grid([arm[seed] for seed in none]), seed=0)
    return f"{gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data.root", dest="root", help="folder that holds Kvasir-SEG")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors; none: from scratch")
    parser.add_argument("--labels", type=int, nargs="+", default=[30, 60], help="near-duplicates count as one")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--round-steps", type=int, default=600)
    parser.add_argument("--round-lr", type=float, default=3e-4)
    parser.add_argument("--val-every", type=int, default=100)
    parser.add_argument("--segmenter", default="tiny")
    parser.add_argument("--no-adapt", dest="adapt", action="store_false", help="use the segmenter as it comes")
    parser.add_argument("--cache")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and train nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for labels, seed in product(args.labels, args.seeds):
            paths = {arm: args.out / f"{labels}-{arm}-{seed}.csv" for arm in args.arms}
            if wanted := {arm: path for arm, path in paths.items() if not path.exists()}:
                cells(args, labels, seed, wanted)
        (args.out / "settings.json").write_text(json.dumps(vars(args), default=str, indent=1), "utf-8")
    print(table(args.out))


if __name__ == "__main__":
    main()
