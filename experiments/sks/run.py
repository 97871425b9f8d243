"""SKS against U-Net, U-Net++, U-Net++ with the classifier's veto, and itself with shuffled labels.

    python experiments/sks/run.py OUT --task ct --weights MOBILENET_V2 --seeds 0 1 2 3 4 5 6 7
    python experiments/sks/run.py OUT --task liver tumour --data.root LITS --weights MOBILENET_V2 --seeds 0 1 2
    python experiments/sks/run.py OUT --table
    python experiments/sks/run.py experiments/sks/results.csv --table

One training is a (task, arm, seed); its figures per image lie in OUT/TASK-ARM-SEED.csv, and what is there is not
repeated, so several processes may share OUT, each with seeds or tasks of its own. All arms have the same encoder, the
same masks and the same number of optimizer steps. An arm with a veto gives two rows of figures, with it and without.
Models of `ct` are scored on 300 phantom images that belong to no split, with `--dev` on 300 others: all choices were
made on those.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kmine.cli import Terminal
from kmine.config import ClassifierConfig, DataConfig, FitConfig, LoopConfig, ModelConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.pool import Pool
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.models.sks import SksModel
from kmine.ops.metrics import case_metrics
from kmine.ops.statistics import holm, paired_difference
from kmine.setup.open import open_for_test, open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.training.veto import clear_veto

SKS = ModelConfig(name="sks", encoder="mobilenetv2_100", levels=3, decoder="unetpp", veto=True)
ALONE = replace(SKS, skip_feature_share=False, skip_resolution=False, skip_coarse=False)
CLEAN = {"clean_share": 0.25}
ARMS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "sks": (SKS, {}),
    "unetpp": (ModelConfig("unetpp", "mobilenet_v2"), {}),
    "alone": (ALONE, {}),
    "shuffled": (SKS, {}),
    "unet": (ModelConfig("unet", "mobilenet_v2"), {}),
    "oracle": (ModelConfig("unetpp", "mobilenet_v2"), {}),
    "sks_clean": (SKS, CLEAN),
    "alone_clean": (ALONE, CLEAN),
    "sks_unet": (replace(SKS, decoder="unet"), {}),
    "sks_classifier": (replace(SKS, fine_init="classifier"), {}),
    "no_feature_share": (replace(SKS, skip_feature_share=False), {}),
    "no_resolution": (replace(SKS, skip_resolution=False), {}),
    "no_coarse": (replace(SKS, skip_coarse=False), {}),
    "levels_4": (replace(SKS, levels=4), {}),
    "unfrozen": (replace(SKS, freeze_coarse=False), {}),
    "no_stage_1": (SKS, {}),
}
"""Model and settings of `fit`. `alone` is the fine branch, which is U-Net++; with the veto, U-Net++ with a veto.
`oracle`, of LiTS, is U-Net++ with the masks of nine of the ten training volumes in place of four. `no_*`: SKS without
one of its skips, or without stage 1: guided by ImageNet's features as they are."""
UNTRAINED = ClassifierConfig(steps=1, lr=1e-9)
OWN_CLASSIFIER = ("shuffled", "levels_4", "no_stage_1")
"""Arms of SKS whose classifier is not that of the arm `sks`."""
TABLE_RECIPE = {
    "decay_norms": True, "encoder_lr": 1.0, "clip_grad": 0.0, "dice": "batch", "flips": "both", "rotation": 30.0,
    "scale": (0.8, 1.25), "checkpoint": "best", "ema_decay": 0.0, "clean_share": 0.0,
}  # fmt: skip
"""Settings of `fit` of the earlier table, which these figures are compared with."""
MAIN = ("sks", "unetpp", "alone", "shuffled", "unet", "sks_clean", "alone_clean")
TASKS = ("ct", "liver", "tumour")
DEV, TEST = range(400, 700), range(1000, 1300)
"""Indices of the phantom images that choices are made on (`--dev`), and of those of the table. The data set of the
experiment is 0 to 399. Neither its own test split is used nor 700 to 999: two seeds of each were seen before the
recipe was settled."""


def config(args: argparse.Namespace, task: str, arm: str, seed: int) -> LoopConfig:
    """Settings of one training."""
    if task == "ct":
        data = DataConfig(kind="ct", size=args.size, label_fraction=args.fraction, cache_dir=args.cache)
    else:
        data = DataConfig(
            name="lits", root=args.root, task=task, slices="all" if task == "liver" else "liver", size=args.size,
            every_nth=args.every_nth, fine_groups=9 if arm == "oracle" else 4, val_fraction=0.2, test_fraction=0.3,
            split_seed=seed, duplicate_distance=-1, cache_dir=args.cache,
        )  # fmt: skip
    model, fit = ARMS[arm]
    trained = ClassifierConfig(steps=args.classifier_steps, shuffle=arm == "shuffled")
    return LoopConfig(
        rounds=0,
        seed=seed,
        out=str(args.out / "runs" / f"{task}-{arm}-{seed}"),
        data=data,
        model=replace(model, encoder_weights=args.weights),
        classifier=UNTRAINED if arm == "no_stage_1" else trained,
        fit=FitConfig(steps=args.steps, **((TABLE_RECIPE if args.recipe == "table" else {"clean_share": 0.0}) | fit)),
    )


def cell(cfg: LoopConfig, path: Path, dev: bool) -> None:
    """Train, then score every image of the test split (or the fresh ones), with the veto and without."""
    began, source, terminal = time.perf_counter(), preflight(cfg), Terminal(quiet=True)
    with closing(RunFolder(Path(cfg.out))) as run:
        task = open_task(cfg, source, run, terminal)
        model = with_shared_classifier(task) or new_model(task)
        middle = time.perf_counter()
        model.load_state_dict(train(task, model, round_idx=0).best)
        seconds = {"classifier": middle - began, "train": time.perf_counter() - middle}
        is_ct = cfg.data.name == "phantom"
        pool = phantom_images(cfg, DEV if dev else TEST) if is_ct else open_for_test(cfg, source, run).pool
        rows = [{"veto": bool(cfg.model.veto), **row} for row in scores(model, pool)]
        if cfg.model.veto:
            clear_veto(model)
            rows += [{"veto": False, **row} for row in scores(model, pool)]
        record = {
            "seconds": seconds, "labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "val": len(task.val),
            "veto": run.read_json(run.root / "round_00" / "veto.json"),
            "classifier": run.read_json(run.root / "classifier" / "metrics.json"), "config": asdict(cfg),
        }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(record, default=str), "utf-8")
    pd.DataFrame(rows).to_csv(path, index=False)
    print(f"{path.stem}: {seconds} {summary(pd.DataFrame(rows))}", flush=True)


def with_shared_classifier(task: Task) -> SksModel | None:
    """The model with the classifier of the arm `sks` of this task and seed, which training it anew would repeat.

    It depends on encoder, data and seed alone. None where that arm is not done, or where this one needs another.
    """
    cfg, root = task.cfg, task.run.root
    _task, arm, seed = root.name.split("-")
    done = root.with_name(f"{_task}-sks-{seed}") / "classifier" / "model.safetensors"
    if cfg.model.name != "sks" or arm in ("sks", *OWN_CLASSIFIER) or not done.exists():
        return None
    model = build_model(cfg.model, task.num_classes, cfg.seed)
    model.classifier.load_state_dict(task.run.load_tensors(done, None)[0])
    if cfg.model.fine_init == "classifier":
        model.net.fine.load_state_dict(model.net.coarse.pyramid.state_dict())
    return model.to(task.fabric.device)


def phantom_images(cfg: LoopConfig, numbers: range) -> Pool:
    """The phantom images of these numbers with their masks."""
    cache = SampleCache(PhantomSource("ct", numbers.stop, cfg.data.size), cfg.data.size, cfg.data.cache_dir, "stop")
    ids = [cache.refs[n].sample_id for n in numbers]
    cache.decode_masks(ids)
    return Pool(cache, ids, {i: i for i in ids}, "true")


def scores(model: LocalModel, pool: Pool) -> Iterator[dict[str, Any]]:
    """Figures of every image; `dice` is NaN where truth and prediction are empty."""
    for probs in infer(model, pool, pool.ids, batch_size=16, tta="none", device=torch.device("cpu")):
        sample = pool.sample(probs.sample_id)
        case = case_metrics(sample.sample_id, probs.mask, sample.mask, model.num_classes, with_hd95=False)
        both, found, truth = case.counts[-1]
        yield {"image": sample.sample_id, "group": sample.group_id, "dice": case.dice, "score": case.score,
               "both": both, "found": found, "truth": truth}  # fmt: skip


def summary(rows: pd.DataFrame) -> dict[str, str]:
    """All-image score, Dice with a lesion, false alarms, missed lesions; with the veto and without."""
    out = {}
    for veto, part in rows.groupby("veto"):
        lesion, clean = part[part["truth"] > 0], part[part["truth"] == 0]
        out["veto" if veto else "plain"] = (
            f"{part['score'].mean():.3f} {lesion['score'].mean():.3f} {(clean['found'] > 0).mean():.3f} "
            f"{(lesion['found'] == 0).mean():.3f}"
        )
    return out


def read_cells(out: Path, task: str) -> pd.DataFrame:
    """Figures of all trainings of a task, from their folder or from the file of `--csv`.

    `arm` ends in +veto for those with it.
    """
    if out.is_file():
        return pd.read_csv(out).query("task == @task")
    frames = []
    for path in sorted(out.glob(f"{task}-*.csv")):
        _, arm, seed = path.stem.split("-")
        rows = pd.read_csv(path)
        name = np.where(rows["veto"], f"{arm}+veto", arm)
        frames.append(rows.drop(columns="veto").assign(task=task, arm=name, seed=int(seed)))
    return pd.concat(frames) if frames else pd.DataFrame()


def table(out: Path) -> str:
    """Markdown: figures of every task and arm, then the differences of SKS, Holm-corrected over the tasks."""
    lines, gaps = [], []
    for task in TASKS:
        cells = read_cells(out, task)
        if cells.empty:
            continue
        lines += [f"\n{task}\n", "| arm | seeds | all images | with a lesion | false alarms | missed | volumes |"]
        lines += ["|---" * 7 + "|"]
        for arm, rows in cells.groupby("arm", sort=False):
            lesion, clean = rows[rows["truth"] > 0], rows[rows["truth"] == 0]
            counts = rows.groupby(["seed", "group"])[["both", "found", "truth"]].sum()
            volumes = (2 * counts["both"] / (counts["found"] + counts["truth"])).mean() if task != "ct" else np.nan
            figures = (rows["score"].mean(), lesion["score"].mean(), (clean["found"] > 0).mean(),
                       (lesion["found"] == 0).mean(), volumes)  # fmt: skip
            lines.append(
                f"| {arm} | {rows['seed'].nunique()} | "
                + " | ".join("" if np.isnan(x) else f"{x:.3f}" for x in figures)
                + " |"
            )
        gaps += [(task, other, which, _gap(cells, other, which)) for other, which in product(OTHERS, ("all", "lesion"))]
    gaps = [gap for gap in gaps if gap[3]]
    corrected: dict[int, float] = {}
    for key in {gap[1:3] for gap in gaps}:
        places = [n for n, gap in enumerate(gaps) if gap[1:3] == key]
        corrected |= dict(zip(places, holm([gaps[n][3].p_value for n in places]), strict=True))
    lines += [
        "\nSKS with its veto minus\n",
        "| task | arm | images | difference | p, Holm over tasks |",
        "|---" * 5 + "|",
    ]
    for n, (task, other, which, gap) in enumerate(gaps):
        words = f"{gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        lines.append(f"| {task} | {other} | {which} | {words} | {corrected[n]:.4f} |")
    return "\n".join(lines)


OTHERS = ("unet", "unetpp", "alone", "alone+veto", "shuffled+veto", "sks", "alone_clean+veto", "sks_clean+veto")


def _gap(cells: pd.DataFrame, other: str, which: str) -> Any:
    """Paired difference of SKS to an arm over the images of all seeds that both have; None without."""
    rows = cells if which == "all" else cells[cells["truth"] > 0]
    grids = [
        rows[rows["arm"] == arm].pivot(index="seed", columns="image", values="score") for arm in (other, "sks+veto")
    ]
    seeds = grids[0].index.intersection(grids[1].index)
    if seeds.empty:
        return None
    groups = rows.drop_duplicates("image").set_index("image")["group"]
    images = grids[0].columns.union(grids[1].columns)
    a, b = (grid.reindex(index=seeds, columns=images).to_numpy(float) for grid in grids)
    return paired_difference(a, b, seed=0, groups=[str(groups[i]) for i in images])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["ct"])
    parser.add_argument("--data.root", dest="root", help="folder with the volumes and segmentations of LiTS")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=MAIN)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument(
        "--fraction", type=float, default=0.1, help="of the phantom's images that have masks; an OUT each"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--classifier-steps", type=int, default=ClassifierConfig.steps)
    parser.add_argument("--recipe", choices=("table", "default"), default="table", help="settings of fit")
    parser.add_argument("--every-nth", type=int, default=1)
    parser.add_argument("--cache")
    parser.add_argument("--dev", action="store_true", help="score images of no split in place of the test split")
    parser.add_argument("--table", action="store_true", help="only print the table of OUT, also a file of --csv")
    parser.add_argument("--csv", type=Path, help="also write the figures of every image to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        for seed, task, arm in product(args.seeds, args.task, args.arms):
            path = args.out / f"{task}-{arm}-{seed}.csv"
            if not path.exists():
                cell(config(args, task, arm, seed), path, args.dev)
    if args.csv:
        cells = pd.concat([read_cells(args.out, task) for task in TASKS])
        cells.round(4).to_csv(args.csv, index=False)
    print(table(args.out))


if __name__ == "__main__":
    main()
