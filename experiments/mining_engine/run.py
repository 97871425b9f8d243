"""What mining is worth: supervised, self-training, mining from each prompt source, and the oracle, at equal steps.

    python experiments/mining_engine/run.py OUT --set kvasir --data.root FOLDER --weights MOBILENET_V2 --labels 30 60 \\
        --seeds 0 1 2 3 4
    python experiments/mining_engine/run.py OUT --table

A cell is (set, labels, seed): round 0, the models of the parts and the adapted segmenter are made once and shared by
its arms. Every arm then spends the same optimizer steps. OUT/CELL/ARM.csv holds Dice on validation and test of the last
adopted round, OUT/CELL/ARM-objects.csv and ARM-images.csv what an audit finds of its pseudo masks: the withheld masks
are read here, after the arm is done, and nowhere else. What is there is not repeated; a stopped training goes on.

The oracle arms are given the true masks of the unlabeled images (`oracle`), or of those that mining kept
(`oracle_kept`): the room, not a method.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from kmine import metrics
from kmine.cli import Terminal
from kmine.config import DataConfig, FitConfig, GateConfig, LoopConfig, ModelConfig, PromptsConfig, SegmenterConfig
from kmine.data.pool import Pool
from kmine.masks import from_rle
from kmine.methods import Task, evaluate_on, new_model, score, train
from kmine.methods.mining import mine
from kmine.methods.self_training import Echo, self_training
from kmine.methods.supervised import supervised
from kmine.preflight import preflight
from kmine.preparation.adaptation import adapt_segmenter
from kmine.preparation.calibration import calibrate
from kmine.records import IGNORE_INDEX, Prompts, RoundResult
from kmine.runs import open_cache, open_for_test, open_task
from kmine.stages.calibrate import true_dice
from kmine.store import RunStore

ARMS = ("supervised", "self_training", "mining", "mining_auto", "mining_cascade", "mining_twice", "mining_thresholds",
        "oracle_kept", "oracle")  # fmt: skip
SHARED = ("round_00", "fold_*", "segmenter", "classifier")
"""Of a cell's first arm, what the others go on from; each artifact is read back only if it was made from the same."""


def config(args: argparse.Namespace, labels: float, seed: int, arm: str, out: Path) -> LoopConfig:
    """Of one arm."""
    if args.set == "lits":
        data = DataConfig(
            name="lits", root=args.root, slices="liver", size=args.size, fine_groups=labels, val_fraction=0.2,
            test_fraction=0.3, split_seed=seed, duplicate_distance=-1, cache_dir=args.cache,
        )  # fmt: skip
        model = ModelConfig(name="sks", encoder="mobilenetv2_100", encoder_weights=args.weights)
    else:
        name = {"kvasir": "kvasir_seg", "covid": "covid_qu_ex"}[args.set]
        data = DataConfig(name=name, root=args.root, size=args.size, fine_groups=labels, cache_dir=args.cache,
                          duplicate_distance=6 if args.set == "kvasir" else 4)  # fmt: skip
        model = ModelConfig(encoder="mobilenet_v2", encoder_weights=args.weights)
    source = arm.removeprefix("mining_")
    prompts = PromptsConfig(source=source if source in ("auto", "cascade") else "local", passes=1 + (source == "twice"))
    return LoopConfig(
        rounds=args.rounds,
        seed=seed,
        out=str(out),
        data=data,
        model=model,
        fit=FitConfig(
            steps=args.steps, round_steps=args.round_steps, round_lr=args.round_lr, **dict(map(_setting, args.fit))
        ),
        prompts=prompts,
        segmenter=SegmenterConfig(name=args.segmenter),
        gate=GateConfig(mode="thresholds" if arm == "mining_thresholds" else "calibrated", target_dice=args.target),
    )


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, value == "true" if value in ("true", "false") else float(value) if value[0].isdigit() else value


def run_arm(args: argparse.Namespace, labels: float, seed: int, arm: str, folder: Path) -> None:
    """Train an arm, audit its pseudo masks, test it."""
    root = folder / arm
    first = next((folder / other for other in args.arms if (folder / f"{other}.csv").exists()), None)
    if first is not None and not root.exists():
        for path in [path for pattern in SHARED for path in first.glob(pattern)]:
            shutil.copytree(path, root / path.name)
    cfg = config(args, labels, seed, arm, root)
    source, store, terminal = preflight(cfg), RunStore(root), Terminal()
    task = open_task(cfg, source, store, terminal)
    results = list(_method(arm, folder, source)(task, store))
    last = [r for r in results if r.adopted][-1]
    _audit(task, store, source, results, folder / arm)
    where = "supervised" if arm == "supervised" else arm if arm.startswith("oracle") else ""
    test, model, how = open_for_test(cfg, source, store)
    rows = []
    for checkpoint, file in (("chosen", "model"), ("final", "model_final")):
        path = store.round_dir(last.round_idx, where if last.round_idx else "") / f"{file}.safetensors"
        weights = store.load_tensors(path, None)[0]
        rows += [
            {"split": split, "checkpoint": checkpoint, "sample_id": case.sample_id,
             "group_id": pool.group_of(case.sample_id), "dice": case.dice}
            for split, pool in (("val", task.val), ("test", test))
            for case in evaluate_on(pool, model, weights, **how).cases
        ]  # fmt: skip
    about = {"labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "adopted_round": last.round_idx}
    frame = pd.DataFrame(rows).assign(**about)
    store.close()
    terminal.stop()
    unfinished = folder / f"{arm}.part"
    frame.to_csv(unfinished, index=False)
    unfinished.replace(folder / f"{arm}.csv")
    means = frame[frame["checkpoint"] == "chosen"].groupby("split")["dice"].mean()
    rounds = ", ".join(f"{r.round_idx}: {r.num_pseudo} pseudo, val {r.metrics.dice:.3f}, {r.reason}" for r in results)
    print(f"{folder.name} {arm}: test {means['test']:.3f}, val {means['val']:.3f} ({rounds})", flush=True)


Method = Callable[[Task, RunStore], Iterator[RoundResult]]


def _method(arm: str, folder: Path, source: Any) -> Method:
    if arm == "supervised":
        return supervised
    if arm.startswith("oracle"):
        return lambda task, store: oracle(task, store, source, arm, folder)
    if arm == "self_training":
        return lambda task, store: self_training(calibrate(replace(task, segmenter=Echo()), Echo(), store), store)
    return lambda task, store: mine(calibrate(adapt_segmenter(task, store), task.segmenter, store), store)


def oracle(task: Task, store: RunStore, source: Any, arm: str, folder: Path) -> Iterator[RoundResult]:
    """As mining, with true masks for pseudo masks, of all unlabeled images or of those that mining kept."""
    truth = _truth(task, source)
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    for round_idx in range(1, task.cfg.rounds + 1):
        ids = truth.ids
        if arm == "oracle_kept":
            kept = pd.read_csv(folder / "mining-images.csv", dtype={"sample_id": str})
            ids = list(kept[(kept["round"] == round_idx) & kept["in_training"]]["sample_id"])
        if not ids:
            return
        how = {"start": current, "pseudo": truth.subset(ids), "pseudo_signature": f"truth of {len(ids)}"}
        fitted = train(task, store, model, round_idx=round_idx, arm=arm, **how)
        counts = {"num_pseudo": len(ids), "before": adopted, "arm": arm}
        result = score(task, store, model, fitted, round_idx=round_idx, **counts)
        yield result
        if result.adopted:
            current, adopted = fitted, result


def _truth(task: Task, source: Any) -> Pool:
    """The unlabeled images with their true masks."""
    cache = open_cache(task.cfg, source)
    bad = {s.sample_id for s in cache.decode_masks(task.unlabeled.ids)}
    ids = [i for i in task.unlabeled.ids if i not in bad]
    return Pool(cache, ids, {i: task.unlabeled.group_of(i) for i in ids}, "true")


def _audit(task: Task, store: RunStore, source: Any, results: Sequence[RoundResult], stem: Path) -> None:
    """What the pseudo masks of every round are worth, by object and by image."""
    truth, objects, images = _truth(task, source), [], []
    known = set(truth.ids)
    for round_idx in [r.round_idx for r in results if r.round_idx]:
        by_image: dict[str, list[dict[str, Any]]] = {}
        for row in store.decisions(round_idx):
            by_image.setdefault(row["sample_id"], []).append(row)
        for sample_id, rows in by_image.items():
            if sample_id in known:
                key = {"round": round_idx, "sample_id": sample_id}
                true_mask = truth.sample(sample_id).mask
                objects += [key | _object(row, true_mask) for row in rows if row["object_idx"] >= 0]
                images.append(key | _image(store, key, rows, true_mask))
    if images:
        for name, rows in (("objects", objects), ("images", images)):
            pd.DataFrame(rows).to_csv(f"{stem}-{name}.csv", index=False)


SCORES = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "confidence_inside",
          "confidence_outside", "area_ratio", "tta_std", "estimated_dice", "estimated_segmenter", "estimated_local",
          "source", "kept", "reason")  # fmt: skip


def _object(row: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    local, answer = (from_rle(row[name], row["height"], row["width"]) for name in ("local_rle", "segmenter_rle"))
    meant = Prompts(row["class_id"], component=local if local.any() else None)
    found = {"dice_local": true_dice(local, meant, truth), "dice_segmenter": true_dice(answer, meant, truth)}
    return {**{name: row[name] for name in SCORES}, **found}


def _image(store: RunStore, key: dict[str, Any], rows: list[dict[str, Any]], truth: np.ndarray) -> dict[str, Any]:
    """Dice of the lesion, the last class: local mask, segmenter's, pseudo mask's where it does not ignore."""
    lesion = max([row["class_id"] for row in rows] + [int(truth[truth != IGNORE_INDEX].max(initial=0)), 1])
    union = {name: np.zeros(truth.shape, bool) for name in ("local_rle", "segmenter_rle")}
    for name, row in product(union, rows):
        if row["object_idx"] >= 0 and row["class_id"] == lesion:
            union[name] |= from_rle(row[name], row["height"], row["width"])
    real = truth == lesion
    out = {"in_training": rows[0]["in_training"], "dice_local": metrics.dice(real, union["local_rle"]),
           "dice_segmenter": metrics.dice(real, union["segmenter_rle"])}  # fmt: skip
    if not out["in_training"]:
        return out | {"dice_pseudo": np.nan, "ignored": np.nan, "dice_local_same_pixels": np.nan}
    with Image.open(store.pseudo_path(key["round"], key["sample_id"])) as image:
        pseudo = np.asarray(image)
    valid = pseudo != IGNORE_INDEX
    return out | {
        "dice_pseudo": metrics.dice(real & valid, (pseudo == lesion) & valid),
        "dice_local_same_pixels": metrics.dice(real & valid, union["local_rle"] & valid),
        "ignored": 1 - valid.mean(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=("kvasir", "covid", "lits"), default="kvasir")
    parser.add_argument("--data.root", dest="root", help="folder that holds the data set")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors; none: from scratch")
    parser.add_argument("--labels", type=float, nargs="+", default=[30, 60], help="groups: near-duplicates, volumes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-steps", type=int, default=400)
    parser.add_argument("--round-lr", type=float, default=3e-4)
    parser.add_argument("--fit", nargs="*", default=[], help="further settings of fit, as in ema_decay=0.99")
    parser.add_argument("--target", type=float, default=GateConfig.target_dice)
    parser.add_argument("--segmenter", default="tiny")
    parser.add_argument("--cache")
    args = parser.parse_args(argv)
    for labels, seed, arm in product(args.labels, args.seeds, args.arms):
        folder = args.out / f"{args.set}-{labels:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"{arm}.csv").exists():
            run_arm(args, labels, seed, arm, folder)


if __name__ == "__main__":
    main()
