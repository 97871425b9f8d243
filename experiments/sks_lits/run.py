"""SKS against U-Net, U-Net++ and itself without guidance: same slices, same masks, same optimizer steps.

    python experiments/sks_lits/run.py OUT --set lits --data.root FOLDER --weights MOBILENET_V2 --seeds 0 1 2 3 4
    python experiments/sks_lits/run.py OUT --set ct --weights MOBILENET_V2 --seeds 0 1 2 3 4
    python experiments/sks_lits/run.py OUT --set ct --table

Each cell (set, budget, arm, seed) trains once on the masks of the budget (and, SKS alone, on the image-level labels of
all training images), opens its test split once and writes OUT/SET-BUDGET-ARM-SEED.csv; cells that are there are not
repeated. In `lits` a seed draws the volumes of every split anew, and Dice is per volume and class, from the counts of
all its slices; in `ct` (the phantom) seeds share the test images, and Dice is per image. In the differences silence on
a clean image counts 1 and a false alarm 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kmine.cli import Terminal
from kmine.config import (
    ClassifierConfig,
    DataConfig,
    FitConfig,
    LoopConfig,
    ModelConfig,
)
from kmine.data.pool import Pool
from kmine.ops.statistics import paired_difference, score_empty_cases
from kmine.setup.open import open_for_test, open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.trainer import train

SKS = ModelConfig(name="sks", encoder="mobilenetv2_100")
ALONE = {"skip_feature_share": False, "skip_resolution": False, "skip_coarse": False}
MODELS = {
    "unet": ModelConfig(name="unet", encoder="mobilenet_v2"),
    "unetpp": ModelConfig(name="unetpp", encoder="mobilenet_v2"),
    "fine_alone": replace(SKS, **ALONE),
    "sks": SKS,
    "sks_shuffled": SKS,
    "feature_share_only": replace(SKS, **{**ALONE, "skip_feature_share": True}),
    "coarse_only": replace(SKS, **{**ALONE, "skip_coarse": True}),
    "no_feature_share": replace(SKS, skip_feature_share=False),
    "no_coarse": replace(SKS, skip_coarse=False),
    "unfrozen": replace(SKS, freeze_coarse=False),
    "levels_3": replace(SKS, levels=3),
    "levels_3_fine_alone": replace(SKS, levels=3, **ALONE),
    "levels_3_shuffled": replace(SKS, levels=3),
}
ARMS = ("unet", "unetpp", "fine_alone", "sks", "sks_shuffled")
"""Of the main table; the others are the ablation."""
PAPER = {"unet": 0.489, "unetpp": 0.509, "sks": 0.549}
"""Tumour Dice on the whole LiTS with 35 finely annotated scans, as the paper reports it (arXiv 2406.14958)."""


def config(args: argparse.Namespace, budget: float, arm: str, seed: int) -> LoopConfig:
    if args.set == "lits":
        data = DataConfig(
            name="lits", root=args.root, task=args.task, slices=args.slices, size=args.size, fine_groups=budget,
            val_fraction=0.2, test_fraction=0.3, split_seed=seed, duplicate_distance=-1, cache_dir=args.cache,
        )  # fmt: skip
    else:
        data = DataConfig(kind="ct", size=args.size, label_fraction=budget, cache_dir=args.cache)
    return LoopConfig(
        rounds=0,
        seed=seed,
        out=str(args.out / "runs" / _name(args.set, budget, arm, seed)),
        data=data,
        model=replace(MODELS[arm], encoder_weights=args.weights),
        classifier=ClassifierConfig(steps=args.classifier_steps, shuffle=arm.endswith("shuffled")),
        fit=FitConfig(steps=args.steps),
    )


def _name(part: str, budget: float, arm: str, seed: int) -> str:
    return f"{part}-{budget:g}-{arm}-{seed}"


def cell(cfg: LoopConfig, path: Path) -> None:
    """Train, then test; the checkpoint is the one that validation chose."""
    source, store, terminal = preflight(cfg), RunFolder(Path(cfg.out)), Terminal()
    task = open_task(cfg, source, store, terminal)
    model = new_model(task)
    weights = train(task, model, round_idx=0).best
    test = open_for_test(cfg, source, store)
    test.model.load_state_dict(weights)
    rows = pd.DataFrame(scores(test.model, test.pool, test.model.num_classes, by_group=cfg.data.name == "lits"))
    auc = store.read_json(store.root / "classifier" / "metrics.json")
    rows["auc"] = max(score for *_, score in auc["history"]) if auc else np.nan
    rows["labeled"], rows["unlabeled"] = len(task.labeled), len(task.unlabeled)
    store.close()
    terminal.stop()
    rows.to_csv(path, index=False)
    means = rows.groupby("class_id")["dice"].mean()
    print(f"{path.stem}: {', '.join(f'class {c} {d:.3f}' for c, d in means.items())}", flush=True)


def scores(model: torch.nn.Module, pool: Pool, num_classes: int, *, by_group: bool) -> list[dict[str, object]]:
    """Dice per class of every image, or of every group from the counts of its images; NaN where both are empty."""
    counts: dict[tuple[str, int], np.ndarray] = {}
    for probs in infer(model, pool, pool.ids, batch_size=16, tta="none", device=torch.device("cpu")):
        sample = pool.sample(probs.sample_id)
        unit = sample.group_id if by_group else sample.sample_id
        for class_id in range(1, num_classes):
            found, truth = probs.mask == class_id, sample.mask == class_id
            triple = np.array([np.count_nonzero(found & truth), np.count_nonzero(found), np.count_nonzero(truth)])
            counts[unit, class_id] = counts.get((unit, class_id), 0) + triple
    return [
        {"unit": unit, "class_id": class_id, "dice": 2 * both / (found + truth) if found + truth else np.nan,
         "found_px": found, "truth_px": truth}
        for (unit, class_id), (both, found, truth) in counts.items()
    ]  # fmt: skip


def table(out: Path, part: str) -> str:
    """Markdown: per budget and class, each arm's mean and the paired difference of SKS to it."""
    frames = []
    for path in sorted(out.glob(f"{part}-*.csv")):
        _, budget, arm, seed = path.stem.split("-")
        frames.append(pd.read_csv(path).assign(budget=float(budget), arm=arm, seed=int(seed)))
    cells = pd.concat(frames)
    # Before seeds that lack a volume make NaN of it.
    cells["score"] = score_empty_cases(cells["dice"].to_numpy(float))
    names = ("masks", "class", "arm", "seeds", "Dice", "sd over seeds", "where a lesion", "false alarms",
             "SKS minus this arm", "AUC of the classifier")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (budget, class_id), rows in cells.groupby(["budget", "class_id"]):
        parts = dict(list(rows.groupby("arm")))
        grids = {arm: part.pivot(index="seed", columns="unit", values="score") for arm, part in parts.items()}
        for arm in [a for a in MODELS if a in grids]:
            grid, part = grids[arm], parts[arm]
            auc = part.groupby("seed")["auc"].first()
            clean = part[part["truth_px"] == 0]
            alarms = f"{(clean['found_px'] > 0).mean():.0%} of {len(clean) // len(grid)}" if len(clean) else "–"
            lines.append(
                f"| {budget:g} | {class_id} | {arm} | {len(grid)} | {part['dice'].mean():.3f} "
                f"| {part.groupby('seed')['dice'].mean().std():.3f} | {part['dice'][part['truth_px'] > 0].mean():.3f} "
                f"| {alarms} | {_difference(grid, grids.get('sks'), arm)} "
                f"| {'' if auc.isna().all() else f'{auc.mean():.2f}'} |"
            )
    return "\n".join(lines)


def _difference(arm: pd.DataFrame, sks: pd.DataFrame | None, name: str) -> str:
    if sks is None or name == "sks":
        return ""
    seeds = arm.index.intersection(sks.index)
    columns = arm.columns.intersection(sks.columns)
    a, b = (grid.loc[seeds, columns].to_numpy(float) for grid in (arm, sks))
    gap = paired_difference(a, b, seed=0)
    return f"{gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=("lits", "ct"), required=True)
    parser.add_argument("--data.root", dest="root", help="folder with volume-*.nii and segmentation-*.nii")
    parser.add_argument("--task", choices=("tumour", "liver", "both"), default="tumour")
    parser.add_argument("--slices", choices=("all", "liver"), default="liver")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors; none: from scratch")
    parser.add_argument("--budgets", type=float, nargs="+", help="volumes with masks (lits), or their share (ct)")
    parser.add_argument("--arms", nargs="+", choices=MODELS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--classifier-steps", type=int, default=200)
    parser.add_argument("--cache")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and train nothing")
    args = parser.parse_args(argv)
    if not args.table:
        budgets = args.budgets or ([2] if args.set == "lits" else [0.1])
        for seed, budget, arm in product(args.seeds, budgets, args.arms):
            path = args.out / f"{_name(args.set, budget, arm, seed)}.csv"
            if not path.exists():
                cell(config(args, budget, arm, seed), path)
    print(table(args.out, args.set))
    (args.out / f"{args.set}.json").write_text(json.dumps(vars(args) | {"paper": PAPER}, default=str), "utf-8")


if __name__ == "__main__":
    main()
