"""The training recipe on Kvasir-SEG: today's, each of its ingredients, the old one, and a bare loop.

    python experiments/recipe/run.py OUT --root KVASIR --weights MOBILENET_V2 --arms new bare --labels 60 480
    python experiments/recipe/run.py OUT --root KVASIR --weights MOBILENET_V2 --arms ingredients --labels 60
    PYTHONPATH=OLD_CLONE python experiments/recipe/run.py OUT ... --arms old --labels 60 480
    python experiments/recipe/run.py OUT_OR_CSV --table

Five folds cover all images, and near-duplicates (kmine's perceptual-hash groups) are in one fold. A cell (fold, labels,
arm) trains U-Net++ with a MobileNetV2 encoder at 128 px, with the fold's number as seed, on labeled images outside its
fold, and writes OUT/cells/FOLD-LABELS-ARM.csv with the Dice of each scored image in its own frame; cells that are there
are not repeated. `new`, `bare` and `old` are scored on the images of the fold. Arms of ingredients are scored on
images outside the fold that are not labeled (validation), never on the fold; `new-on-validation` is their reference.

30 images, neither labeled nor scored, serve to choose or watch checkpoints; with all images labeled, 30 of those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kmine import cli
from kmine.config import FitConfig, LoopConfig
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.data.splits import merge_duplicates
from kmine.models.base import LocalModel
from kmine.ops.metrics import case_metrics
from kmine.setup.open import open_cache
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import make_fabric
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train

sys.path.append(str(Path(__file__).resolve().parents[1]))
import folds
from folds import NUM_FOLDS, is_locked, parts_of

MOST_SCORED = 200
INGREDIENTS = {
    "new-on-validation": {},
    "new-with-encoder_lr_0.1": {"fit.encoder_lr": "0.1"},
    "new-with-encoder_lr_0.3": {"fit.encoder_lr": "0.3"},
    "new-with-ema": {"fit.ema_decay": "0.99"},
    "new-without-rotation": {"fit.rotation": "30.0"},
    "new-without-wide_scale": {"fit.scale": "[0.8, 1.25]"},
    "new-without-image_dice": {"fit.dice": "batch"},
    "new-without-last_step": {"fit.checkpoint": "best"},
    "new-with-letterbox": {"data.resize": "letterbox"},
    "new-with-native_pixels": {"fit.supersample": "2"},
    "new-with-vertical_flip": {"fit.flips": "both"},
    "new-without-clip": {"fit.clip_grad": "0.0"},
    "new-without-area_masks": {"data.mask_resize": "nearest"},
    "new-with-width_16": {"model.decoder_width": "16"},
    "new-without-norm_rule": {"fit.decay_norms": "true"},
    "new-with-depth_5": {"model.encoder_depth": "5"},
    "new-with-unet": {"model.name": "unet"},
    "new-with-lr_2e-3": {"fit.lr": "0.002"},
    "new-with-unet-lr_2e-3": {"model.name": "unet", "fit.lr": "0.002"},
    "new-with-bf16": {"fit.precision": "bf16"},
    "new-without-three": {"fit.clip_grad": "0.0", "fit.decay_norms": "true", "data.mask_resize": "nearest"},
    "new-without-five": {
        **{"fit.clip_grad": "0.0", "fit.decay_norms": "true", "data.mask_resize": "nearest"},
        **{"fit.rotation": "30.0", "fit.scale": "[0.8, 1.25]"},
    },
}
"""Settings by dotted name that differ from the reference, `new-on-validation`."""
BARE_RATES = {"bare": 1e-4, "bare-full-rate": 1e-3}
"""Learning rate of the encoder in the bare loop; that of the decoder is 1e-3."""
ARMS = ("new", *BARE_RATES, "old", *INGREDIENTS)
IS_OLD = "dice" not in {field.name for field in fields(FitConfig)}


class Quiet:
    """A `ProgressReporter` that prints what is logged."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None:
        print(text, flush=True)


def settings(args: argparse.Namespace, arm: str, fold: int) -> LoopConfig:
    """Settings of a cell: the code's own defaults, but for those that all arms share."""
    changes = {
        **{
            "data.name": "kvasir_seg",
            "data.root": args.root,
            "data.size": "128",
            "data.cache_dir": f"{args.out}/cache",
        },
        **{"model.encoder_weights": args.weights, "fit.steps": str(args.steps), "seed": str(fold), "device": "cpu"},
        "fit.precision": getattr(args, "precision", "auto"),
        **INGREDIENTS.get(arm, {}),
    }
    cfg = cli.override(LoopConfig, cli.to_dict(LoopConfig()), changes, "recipe")
    if IS_OLD:
        return cfg
    from kmine.setup.resolve import resolve_settings

    return resolve_settings(cfg, open_source(cfg.data))


def run_cell(args: argparse.Namespace, fold: int, num_labels: int, arm: str) -> pd.DataFrame:
    """Train and score one cell."""
    began, cfg = time.perf_counter(), settings(args, arm, fold)
    cache = open_cache(cfg, open_source(cfg.data))
    refs = merge_duplicates(cache.refs, cache.hashes, cfg.data.duplicate_distance)
    groups = {ref.sample_id: ref.group_id for ref in refs}
    parts = parts_of(groups, fold, num_labels)
    labeled, checked = (Pool(cache, parts[name], groups, "true") for name in ("labeled", "checked"))
    scored = parts["others"][:MOST_SCORED] if arm in INGREDIENTS else parts["test"]
    if not scored:
        raise SystemExit(f"{arm} is scored on images that are not labeled; give it fewer labels than {num_labels}")
    if arm in BARE_RATES:
        model = train_bare(args, labeled, fold, BARE_RATES[arm])
    else:
        folder = Path(args.out) / "runs" / f"{fold}-{num_labels}-{arm}"
        pools = (labeled, Pool(cache, parts["others"], groups), checked)
        model = trained_model(cfg, pools, folder, f"{fold} {num_labels}")
    trained = time.perf_counter() - began
    dice = score(model, Pool(cache, scored, groups, "true"))
    print(
        f"fold {fold}, {len(labeled)} labels, {arm}: {np.mean(dice):.3f} on {len(scored)} images; trained in "
        f"{trained:.0f} s, scored in {time.perf_counter() - began - trained:.0f} s",
        flush=True,
    )
    where = {"arm": arm, "fold": fold, "labels": num_labels, "seconds": round(trained, 1)}
    return pd.DataFrame(
        [{**where, "sample_id": i, "group": groups[i], "dice": d} for i, d in zip(scored, dice, strict=True)]
    )


def trained_model(cfg: LoopConfig, pools: tuple[Pool, Pool, Pool], folder: Path, signature: str) -> LocalModel:
    """A model of round 0, from scratch; `pools`: labeled, unlabeled, to watch. Its run folder is removed when done."""
    labeled, unlabeled, checked = pools
    run = RunFolder(folder)
    task = Task(
        cfg, 2, labeled, unlabeled, checked, None, make_fabric("cpu", cfg.fit.precision), signature, Quiet(), run
    )
    model = new_model(task)
    model.load_state_dict(train(task, model, round_idx=0).best)
    run.close()
    shutil.rmtree(folder)
    return model


def score(model: LocalModel, pool: Pool) -> list[float]:
    """Dice of each image in its own frame, without test-time augmentation."""
    predictions = infer(model, pool, pool.ids, batch_size=16, tta="none", device=torch.device("cpu"))
    return [
        case_metrics(p.sample_id, p.mask, pool.sample(p.sample_id).mask, 2, with_hd95=False).dice for p in predictions
    ]


def train_bare(args: argparse.Namespace, labeled: Pool, seed: int, encoder_rate: float) -> LocalModel:
    """A loop of common best practice around segmentation-models-pytorch: the same network, steps, batch and images.

    Dice and cross-entropy of smp and torch, AdamW with a rate for the encoder, cosine decay, flips, affine changes and
    colour jitter of albumentations, the last step.
    """
    import albumentations as A
    import segmentation_models_pytorch as smp

    from kmine.models.encoder_weights import load_encoder

    torch.manual_seed(seed)
    net = smp.UnetPlusPlus("mobilenet_v2", 4, None, decoder_channels=(64, 32, 16, 8), classes=2)
    load_encoder(net.encoder, args.weights, "mobilenet_v2")
    model = LocalModel(net, 2, 16, "half").to(memory_format=torch.channels_last).train()
    augment = A.Compose(
        [
            *(A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)),
            A.Affine(scale=(0.75, 1.25), translate_percent=(-0.1, 0.1), rotate=(-45, 45), p=0.7),
            A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.05, 0.05), p=0.7),
        ],
        seed=seed,
    )
    rest = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": net.encoder.parameters(), "lr": encoder_rate}, {"params": rest, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    dice, entropy = smp.losses.DiceLoss("multiclass", classes=[1]), torch.nn.CrossEntropyLoss()
    rng, queue = np.random.default_rng(seed), []
    for _ in range(args.steps):
        while len(queue) < 8:
            queue += list(rng.permutation(labeled.ids))
        drawn, queue = queue[:8], queue[8:]
        pairs = [augment(image=labeled.image_resized(i), mask=labeled.mask_resized(i)) for i in drawn]
        images = torch.from_numpy(np.stack([pair["image"] for pair in pairs])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([pair["mask"] for pair in pairs])).long()
        logits = model(images)
        optimizer.zero_grad()
        (dice(logits, masks) + entropy(logits, masks)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def table(source: Path, reference: str | None = None) -> str:
    """Markdown of the cells of a folder or CSV."""
    cells = folds.read_cells(source)
    against = reference or ("new-on-validation" if "new-on-validation" in {*cells.arm} else "new")
    return folds.table((rows for _, rows in cells.groupby("labels")), against)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder; with --table also a CSV")
    parser.add_argument("--root", "--data.root", help="folder of Kvasir-SEG")
    parser.add_argument("--weights", help="MobileNetV2 encoder weights (.safetensors)")
    parser.add_argument("--arms", nargs="+", default=["new", "bare"], help="arms, or ingredients for all of those")
    parser.add_argument("--labels", nargs="+", type=int, default=[60], help="480: all images outside the fold")
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(NUM_FOLDS)))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--precision", default="32", help="of training: that of all tables here is 32")
    parser.add_argument("--table", action="store_true", help="print the table of a folder or CSV; trains nothing")
    parser.add_argument("--reference", help="of the table's differences")
    args = parser.parse_args()
    if args.table:
        return print(table(args.out, args.reference))
    arms = [arm for name in args.arms for arm in (INGREDIENTS if name == "ingredients" else [name])]
    check(args, arms)
    torch.set_num_threads(1)
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    for num_labels, arm, fold in [(n, a, f) for n in args.labels for a in arms for f in args.folds]:
        path = args.out / "cells" / f"{fold}-{num_labels}-{arm}.csv"
        with path.with_suffix(".lock").open("w") as lock:
            if path.exists() or not is_locked(lock):
                continue
            unfinished = path.with_suffix(".tmp")
            run_cell(args, fold, num_labels, arm).to_csv(unfinished, index=False)
            unfinished.rename(path)
    (args.out / "command.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}))
    return None


def check(args: argparse.Namespace, arms: Sequence[str]) -> None:
    """Refuse unknown arms, and arms of the other code."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not args.root or not args.weights:
        raise SystemExit(f"expected --root, --weights and arms of {', '.join(ARMS)}; unknown: {unknown}")
    if any((arm == "old") != IS_OLD for arm in arms):
        raise SystemExit("the arm old, and no other, needs PYTHONPATH=CLONE with a clone of commit 23070cf")


if __name__ == "__main__":
    main()
