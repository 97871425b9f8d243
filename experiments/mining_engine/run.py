"""What mining is worth: supervised, self-training, mining from each prompt source, and the oracle, at equal steps.

    python experiments/mining_engine/run.py OUT --set kvasir --data.root FOLDER --weights MOBILENET_V2 --labels 30 60 \\
        --seeds 0 1 2 3 4 --folds
    python experiments/mining_engine/run.py OUT --table [--split val] [--csv FOLDER]   # OUT: also such a folder

A cell is (set, labels, seed): round 0, the models of the parts and the adapted segmenter are made once and shared by
its arms. Every arm then spends the same optimizer steps. With `--folds` the seeds 0 to 4 are five folds that cover all
images, each the test split once, and differences have intervals over folds. In the differences silence on a clean image
counts 1, a false alarm 0. OUT/CELL/ARM.csv holds Dice on validation and test of the kept round, OUT/CELL/
ARM-objects.csv and ARM-images.csv what an audit finds of its pseudo masks: the withheld masks are read here, after the
arm is done, and nowhere else. What is there is not repeated, a stopped training goes on, and processes can share OUT.

`simulated` mines with a simulation of a segmenter of SAM's published quality on polyps (box IoU .85): truth, degraded.
It says what such a segmenter would bring, and nothing about SAM. The oracle arms are given the true masks of the
unlabeled images (`oracle`), or of those that mining kept (`oracle_kept`): the room, not a method.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from folds import difference, is_locked, parts_of
from helpers.simulated_segmenter import PUBLISHED_IOU, Simulated

from kmine.cli import Terminal
from kmine.config import (
    DataConfig,
    FitConfig,
    GateConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    SegmenterConfig,
)
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.data.source import Source
from kmine.data.splits import merge_duplicates
from kmine.methods import registry as arms
from kmine.methods.mining import mine
from kmine.mining.calibration.fit import true_dice
from kmine.mining.calibration.step import calibrate
from kmine.mining.rank import fit_ranking
from kmine.ops import metrics
from kmine.ops.calibrator import evidence_from_row
from kmine.ops.masks import from_rle
from kmine.ops.statistics import paired_difference, score_empty_cases
from kmine.segmenters.base import Segmenter
from kmine.setup.open import open_cache, open_for_test, open_task, open_truth
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.inference import infer
from kmine.training.rounds import kept_round, train_rounds
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX, Prompts, RoundResult

ARMS = ("supervised", "supervised_once", "self_training", "mean_teacher", "fixmatch", "unimatch", "mining",
        "mining_auto", "mining_cascade", "mining_twice", "mining_ranked", "simulated", "simulated_ranked",
        "simulated_all", "self_training_all", "oracle_kept", "oracle")  # fmt: skip
BASELINE, LABELS_ONLY = "baseline", ("supervised", "supervised_once")
"""The baseline of a cell is that of the arms with labels alone which is better on validation."""
SHARED = ("round_00", "fold_*", "segmenter", "classifier")
"""What an arm takes over from those before; each artifact is read back only if it was made from the same."""


def config(args: argparse.Namespace, labels: float, seed: int, arm: str, out: Path) -> LoopConfig:
    """Of one arm."""
    if args.set == "lits":
        data = DataConfig(
            name="lits", root=args.root, task=args.task, slices="liver" if args.task == "tumour" else "all",
            size=args.size, fine_groups=labels, val_fraction=0.2, test_fraction=0.3, split_seed=seed,
            duplicate_distance=-1, cache_dir=args.cache,
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
        retrain=args.retrain,
        seed=seed,
        out=str(out),
        data=data,
        model=model,
        fit=FitConfig(
            steps=args.steps, round_steps=args.round_steps, round_lr=args.round_lr, **dict(map(_setting, args.fit))
        ),
        prompts=prompts,
        segmenter=SegmenterConfig(name=args.segmenter),
        gate=_gate(arm, args.target),
    )


def _gate(arm: str, target: float) -> GateConfig:
    if arm.endswith("_all"):
        return GateConfig(mode="ranked", keep=1.0)
    return GateConfig(mode="ranked" if arm.endswith("_ranked") else "calibrated", target_dice=target)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, value == "true" if value in ("true", "false") else float(value) if value[0].isdigit() else value


def run_arm(args: argparse.Namespace, labels: float, seed: int, arm: str, folder: Path) -> None:
    """Train an arm, audit its pseudo masks, test it."""
    root = folder / arm
    take_over(root, folder)
    cfg = config(args, labels, seed, arm, root)
    cfg = on_fold(cfg, labels, seed, folder) if args.folds else cfg
    source, store, terminal = preflight(cfg), RunFolder(root), Terminal()
    keep_fingerprint(store, source)
    task = open_task(cfg, source, store, terminal)
    results = list(_method(arm, folder, source, args.iou)(task))
    last = kept_round(results)
    audit(task, source, [r.round_idx for r in results if r.round_idx], folder / arm)
    calibrated = store.read_json(root / "calibration" / "calibration.json")
    if calibrated and calibrated["promise"]:
        (folder / f"{arm}-promise.json").write_text(json.dumps(calibrated["promise"]), "utf-8")
    where = "" if arm.startswith(("mining", "simulated")) else arms.method_dir_of(arm.removesuffix("_all"))
    test = open_for_test(cfg, source, store)
    rows = []
    for checkpoint, file in (("chosen", "model"), ("final", "model_final")):
        path = store.round_dir(last.round_idx, where if last.round_idx else "") / f"{file}.safetensors"
        weights = store.load_tensors(path, None)[0]
        test.model.load_state_dict(weights)
        rows += [
            {"split": split, "checkpoint": checkpoint, "sample_id": unit, "dice": dice, "clean": clean}
            for split, pool in (("val", task.val), ("test", test.pool))
            for unit, (dice, clean) in lesion_dice(
                test.model, pool, test.fabric.device, by_group=args.set == "lits"
            ).items()
        ]
    about = {"labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "adopted_round": last.round_idx}
    frame = pd.DataFrame(rows).assign(**about)
    store.close()
    terminal.stop()
    unfinished = folder / f"{arm}.part"
    frame.to_csv(unfinished, index=False, float_format="%.4f")
    unfinished.replace(folder / f"{arm}.csv")
    means = frame[frame["checkpoint"] == "chosen"].groupby("split")["dice"].mean()
    rounds = ", ".join(f"{r.round_idx}: {r.num_pseudo} pseudo, val {r.metrics.dice:.3f}, {r.reason}" for r in results)
    print(f"{folder.name} {arm}: test {means['test']:.3f}, val {means['val']:.3f} ({rounds})", flush=True)


def take_over(root: Path, cell: Path) -> None:
    """Begin the run folder `root`, unless it is there, with what the runs of a cell share (parts.py: its *.run)."""
    if root.exists():
        return
    arms = [cell / arm for arm in ARMS if (cell / f"{arm}.csv").exists()]
    for other in (*sorted(cell.glob("parts/*.run")), *arms):
        for path in [path for pattern in SHARED for path in other.glob(pattern)]:
            shutil.copytree(path, root / path.name, dirs_exist_ok=True)
        known = json.loads((other / "run.json").read_text())
        claimed = {name: known[name] for name in ("split_file_sha256", "data_fingerprint") if name in known}
        (root / "run.json").write_text(json.dumps(claimed))


def keep_fingerprint(store: RunFolder, source: Source) -> None:
    """Take the data for those that the run, or the cell, began with, whose copies have other modification times."""
    if "data_fingerprint" not in store.run():
        store.update_run(data_fingerprint=source.fingerprint())


def on_fold(cfg: LoopConfig, labels: float, fold: int, cell: Path) -> LoopConfig:
    """The settings with the fold's CELL/splits.csv, which is made if it is not there."""
    path = cell / "splits.csv"
    if not path.exists():
        write_fold(cfg, int(labels), fold, path)
    return replace(cfg, data=replace(cfg.data, fine_groups=None, split_file=str(path)))


def write_fold(cfg: LoopConfig, num_labels: int, fold: int, path: Path) -> None:
    """The splits.csv of one of five folds: the fold is the test split, `num_labels` images outside it are labeled."""
    cache = open_cache(cfg, open_source(cfg.data))
    groups = {r.sample_id: r.group_id for r in merge_duplicates(cache.refs, cache.hashes, cfg.data.duplicate_distance)}
    names = {"labeled": "labeled", "checked": "val", "others": "unlabeled", "test": "test"}
    parts = parts_of(groups, fold, num_labels)
    rows = [(i, groups[i], split) for part, split in names.items() for i in parts[part]]
    unfinished = path.with_suffix(".part")
    pd.DataFrame(rows, columns=["sample_id", "group_id", "split"]).to_csv(unfinished, index=False)
    unfinished.replace(path)


def lesion_dice(model: Any, pool: Pool, device: Any, *, by_group: bool) -> dict[str, tuple[float, bool]]:
    """Dice of the last class by image, or by volume from the counts of its slices, and whether the truth lacks it.

    Dice is NaN where the prediction has none either.
    """
    counts: dict[str, np.ndarray] = {}
    for probs in infer(model, pool, pool.ids, batch_size=16, tta="none", device=device):
        sample, lesion = pool.sample(probs.sample_id), len(probs.probs) - 1
        valid = sample.mask != IGNORE_INDEX
        seen, real = (probs.mask == lesion) & valid, (sample.mask == lesion) & valid
        unit = sample.group_id if by_group else sample.sample_id
        counts[unit] = counts.get(unit, 0) + np.array([(seen & real).sum(), seen.sum(), real.sum()])
    return {
        unit: (2 * both / (seen + real) if seen + real else np.nan, bool(real == 0))
        for unit, (both, seen, real) in counts.items()
    }


Method = Callable[[Task], Iterator[RoundResult]]


def _method(arm: str, folder: Path, source: Any, iou: float) -> Method:
    if arm == "oracle":
        return lambda task: arms.method(arm, open_truth(task, source))(task)
    if arm == "oracle_kept":
        return lambda task: oracle_kept(task, open_truth(task, source), folder)
    if arm.startswith("simulated"):
        return lambda task: _mine_with(simulated(task, source, iou), task)
    return arms.method(arm.split("_")[0] if arm.startswith("mining") else arm.removesuffix("_all"))


def _mine_with(segmenter: Segmenter, task: Task) -> Iterator[RoundResult]:
    return mine(calibrate(replace(task, segmenter=segmenter), segmenter))


def simulated(task: Task, source: Any, iou: float) -> Segmenter:
    return Simulated.from_pools([task.labeled, task.val, open_truth(task, source)], iou, task.cfg.seed)


def oracle_kept(task: Task, truth: Pool, folder: Path) -> Iterator[RoundResult]:
    """As mining, with true masks for pseudo masks, of those images that mining kept in the same round."""
    kept = pd.read_csv(folder / "mining-images.csv", dtype={"sample_id": str})

    def how(round_idx: int) -> dict[str, Any] | None:
        ids = list(kept[(kept["round"] == round_idx) & kept["in_training"]]["sample_id"])
        return {"pseudo": truth.subset(ids), "pseudo_signature": f"truth of {len(ids)}"} if ids else None

    return train_rounds(task, "oracle_kept", how)


def audit(task: Task, source: Any, rounds: Sequence[int], stem: Path) -> None:
    """What the pseudo masks of every round are worth, by object and by image."""
    truth, objects, images = open_truth(task, source), [], []
    known = set(truth.ids)
    for round_idx in rounds:
        by_image: dict[str, list[dict[str, Any]]] = {}
        for row in (decision.to_arrow() for decision in task.run.decisions(round_idx)):
            by_image.setdefault(row["sample_id"], []).append(row)
        for sample_id, rows in by_image.items():
            if sample_id in known:
                key = {"round": round_idx, "sample_id": sample_id}
                true_mask = truth.sample(sample_id).mask
                objects += [key | _object(row, true_mask) for row in rows if row["object_idx"] >= 0]
                images.append(key | _image(task.run, key, rows, true_mask))
    if images:
        for name, rows in (("objects", objects), ("images", images)):
            pd.DataFrame(rows).to_csv(f"{stem}-{name}.csv", index=False, float_format="%.4f")


SCORES = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "confidence_inside",
          "confidence_outside", "area_ratio", "tta_std", "estimated_dice", "estimated_segmenter", "estimated_local",
          "source", "kept", "reason")  # fmt: skip


def _object(row: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    local, answer = (from_rle(row[name], row["height"], row["width"]) for name in ("local_rle", "segmenter_rle"))
    meant = Prompts(row["class_id"], component=local if local.any() else None)
    found = {"dice_local": true_dice(local, meant, truth), "dice_segmenter": true_dice(answer, meant, truth)}
    return {**{name: row[name] for name in SCORES}, **found}


TAUGHT = ("dice_pseudo", "dice_local_same_pixels", "ignored", *metrics.Correction._fields, "lesion", "lesion_taught",
          "wrong_taught")  # fmt: skip
"""What is known of images that taught; of the others only the local model's `wrong` pixels and those of the `lesion`.
`lesion_taught`: pixels of it that are taught as such, `wrong_taught`: those that are taught wrongly."""


def _image(store: RunFolder, key: dict[str, Any], rows: list[dict[str, Any]], truth: np.ndarray) -> dict[str, Any]:
    """Dice of the lesion, the last class: local mask, segmenter's, pseudo mask's where it does not ignore."""
    lesion = max([row["class_id"] for row in rows] + [int(truth[truth != IGNORE_INDEX].max(initial=0)), 1])
    union = {name: np.zeros(truth.shape, bool) for name in ("local_rle", "segmenter_rle")}
    for name, row in product(union, rows):
        if row["object_idx"] >= 0 and row["class_id"] == lesion:
            union[name] |= from_rle(row[name], row["height"], row["width"])
    real = truth == lesion
    out = {"in_training": rows[0]["in_training"], "dice_local": metrics.dice(real, union["local_rle"]),
           "dice_segmenter": metrics.dice(real, union["segmenter_rle"])}  # fmt: skip
    local, true = (np.where(mask, np.uint8(lesion), 0) for mask in (union["local_rle"], real))
    known = np.where(truth == IGNORE_INDEX, truth, true)
    if not out["in_training"]:
        wrong = metrics.correction(local, np.full_like(local, IGNORE_INDEX), known).wrong
        return out | dict.fromkeys(TAUGHT, np.nan) | {"wrong": wrong, "lesion": int(real.sum())}
    pseudo = store.pseudo_mask(key["round"], key["sample_id"])
    valid = pseudo != IGNORE_INDEX
    seen = np.where(pseudo == lesion, np.uint8(lesion), 0)
    changes = metrics.correction(local, np.where(valid, seen, IGNORE_INDEX), known)
    dice = (metrics.dice(real & valid, mask & valid) for mask in (pseudo == lesion, union["local_rle"]))
    pixels = (real, real & (seen == lesion), valid & (known != IGNORE_INDEX) & (seen != known))
    counts = (int(np.count_nonzero(which)) for which in pixels)
    return out | dict(zip(TAUGHT, (*dice, 1 - valid.mean(), *changes, *counts), strict=True))


SCORED = ("set, labels", "arm", "seeds", "Dice", "sd over seeds", "last step", "where a lesion", "false alarms",
        "minus baseline", "minus self-training")  # fmt: skip
QUALITY = ("set, labels", "arm", "round", "local", "segmenter", "pseudo masks", "local, same pixels", "coverage",
           "ignored", "corrected / newly broken", "rank correlation", "promised", "achieved")  # fmt: skip


KEYS = ["set", "labels", "seed", "arm"]
"""Columns by which rows of different cells and arms are told apart."""


def read(source: Path, name: str) -> pd.DataFrame:
    """`results`, `images` or `objects` of all arms: of the cells of a folder, or from its file of that name."""
    cells = sorted(source.glob("*-*-*/"))
    if not cells and (source / f"{name}.csv").exists():
        return pd.read_csv(source / f"{name}.csv", dtype={"sample_id": str, "group": str})
    found, suffix = [], "" if name == "results" else f"-{name}"
    for cell, arm in product(cells, ARMS):
        path = cell / f"{arm}{suffix}.csv"
        if path.exists() and (cell / f"{arm}.csv").exists():
            rows = pd.read_csv(path, dtype={"sample_id": str})
            if name == "results":
                rows["group"] = _groups(cell, rows["sample_id"])
            if name == "images":
                promise = cell / f"{arm}-promise.json"
                rows["promised"] = json.loads(promise.read_text())["lower_bound"] if promise.exists() else np.nan
            found.append(rows.assign(**dict(zip(KEYS, (*cell.name.split("-"), arm), strict=True))))
    rows = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=KEYS)
    return rows.astype({"labels": float, "seed": int})


def _groups(cell: Path, ids: pd.Series) -> pd.Series:
    """Groups of near-duplicates, of cells that are folds; None of others."""
    path = cell / "splits.csv"
    return ids.map(pd.read_csv(path, dtype=str).set_index("sample_id")["group_id"]) if path.exists() else ids.map({})


def with_baseline(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `results` and those of the baseline of each cell once more, as an arm of its own."""
    known = rows[rows["arm"].isin(LABELS_ONLY)]
    watched = known[(known["split"] == "val") & (known["checkpoint"] == "chosen")]
    means = watched.groupby(KEYS)["dice"].mean().reset_index()
    best = means.loc[means.groupby(KEYS[:3])["dice"].idxmax(), KEYS]
    return pd.concat([rows, known.merge(best, on=KEYS).assign(arm=BASELINE)], ignore_index=True)


def table(source: Path, split: str = "test") -> str:
    """Markdown: Dice by arm on a split with paired differences, then what the pseudo masks were worth.

    `source`: the folder of the cells or of the three CSVs, or results.csv among these.
    """
    source = source.parent if source.is_file() else source
    results, images, objects = (read(source, name) for name in ("results", "images", "objects"))
    if results.empty:
        raise SystemExit(f"{source}: expected a finished cell or results.csv, found none")
    results = with_baseline(results)
    lines, quality = ([f"| {' | '.join(names)} |", "|---" * len(names) + "|"] for names in (SCORED, QUALITY))
    for (data, labels), rows in results[results["split"] == split].groupby(["set", "labels"]):
        for arm in (arm for arm in (BASELINE, *ARMS) if arm in {*rows["arm"]}):
            name = f"| {data}, {labels:g} | {arm} |"
            lines.append(f"{name} {_scored_row(rows, arm)} |")
            own = (f[(f["set"] == data) & (f["labels"] == labels) & (f["arm"] == arm)] for f in (images, objects))
            quality += [f"{name} {row} |" for row in _quality_rows(*own)]
    return "\n".join([*lines, "", *quality])


def _scored_row(rows: pd.DataFrame, arm: str) -> str:
    """`rows`: of all arms of a data set and number of labels on a split."""
    own = rows[rows["arm"] == arm]
    kept, last = (own[own["checkpoint"] == name] for name in ("chosen", "final"))
    by_seed = kept.groupby("seed")["dice"].mean()
    sd = f"{by_seed.std():.3f}" if len(by_seed) > 1 else "–"
    gaps = [_gap(rows[rows["checkpoint"] == "chosen"], arm, other) for other in (BASELINE, "self_training")]
    means = (f"{by_seed.mean():.3f}", sd, f"{last.groupby('seed')['dice'].mean().mean():.3f}")
    return " | ".join([str(len(by_seed)), *means, *_clean_figures(kept), *gaps])


def _clean_figures(rows: pd.DataFrame) -> list[str]:
    """Mean Dice where there is a lesion, and the share of clean images with a false alarm."""
    lesions, clean = rows[~rows["clean"]].groupby("seed")["dice"].mean(), rows.loc[rows["clean"], "dice"]
    number = len(clean) // rows["seed"].nunique()
    return [f"{lesions.mean():.3f}", f"{clean.notna().mean():.0%} of {number}" if len(clean) else "–"]


def _gap(rows: pd.DataFrame, arm: str, other: str) -> str:
    """Paired by seed and image, over the seeds that have both; of folds with the interval over folds."""
    pair = rows[rows["arm"].isin((arm, other))].assign(fold=rows["seed"])
    seeds = pair.groupby("seed")["arm"].nunique() == 2
    pair = pair[pair["seed"].isin(seeds.index[seeds])]
    pair = pair.assign(dice=score_empty_cases(pair["dice"].to_numpy(float)))
    if pair.empty or arm == other:
        return "–"
    if pair["group"].notna().all():
        found = difference(pair, arm, other)
        return _text(found.mean, *found.folds)
    a, b = (pair[pair["arm"] == name].pivot(index="seed", columns="sample_id", values="dice") for name in (other, arm))
    gap = paired_difference(a.to_numpy(float), b.reindex_like(a).to_numpy(float), seed=0)
    return _text(gap.difference, gap.low, gap.high)


def _text(difference: float, low: float, high: float) -> str:
    return f"{difference:+.3f}" if np.isnan(low) else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def _quality_rows(images: pd.DataFrame, objects: pd.DataFrame) -> Iterator[str]:
    """By round, means over seeds of what each seed's audit found; rows of one data set, number of labels and arm."""
    for number, of_round in images.groupby("round"):
        seeds = []
        for seed, rows in of_round.groupby("seed"):
            kept, some = rows[rows["in_training"]], objects[(objects["round"] == number) & (objects["seed"] == seed)]
            used = some["dice_local"].where(some["source"] == "local", some["dice_segmenter"])
            by = _ranked_by(some)
            rank = spearmanr(by, used, nan_policy="omit").statistic if by.notna().sum() > 2 else np.nan
            changes = metrics.Correction(*(int(kept[name].sum()) for name in metrics.Correction._fields))
            seeds.append([rows["dice_local"].mean(), rows["dice_segmenter"].mean(), kept["dice_pseudo"].mean(),
                          kept["dice_local_same_pixels"].mean(), rows["in_training"].mean(), kept["ignored"].mean(),
                          *changes.shares, rank, rows["promised"].iloc[0], used[some["kept"]].mean()])  # fmt: skip
        means = ["–" if np.isnan(value) else f"{value:.3f}" for value in pd.DataFrame(seeds).mean()]
        yield " | ".join([str(number), *means[:6], " / ".join(means[6:8]), *means[8:]])


def _ranked_by(objects: pd.DataFrame) -> pd.Series:
    """What the gate ranks the objects of a round by: estimated Dice, or without calibration their evidence."""
    if objects["estimated_dice"].notna().any() or objects.empty:
        return objects["estimated_dice"]
    evidence = [evidence_from_row(row) for row in objects.to_dict("records")]
    return pd.Series(fit_ranking(evidence, keep=1.0).scores(evidence), objects.index)


def make_parser(about: str) -> argparse.ArgumentParser:
    """Flags of a cell and of its trainings."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=("kvasir", "covid", "lits"), default="kvasir")
    parser.add_argument("--task", choices=("tumour", "liver"), default="tumour", help="of LiTS; liver: in all slices")
    parser.add_argument("--data.root", dest="root", help="folder that holds the data set")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors; none: from scratch")
    parser.add_argument("--labels", type=float, nargs="+", default=[30, 60], help="groups: near-duplicates, volumes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-steps", type=int, default=400)
    parser.add_argument("--round-lr", type=float, default=3e-4)
    parser.add_argument("--no-retrain", dest="retrain", action="store_false", help="end with the last round")
    parser.add_argument("--fit", nargs="*", default=[], help="further settings of fit, as in ema_decay=0.99")
    parser.add_argument("--target", type=float, default=GateConfig.target_dice)
    parser.add_argument("--segmenter", default="tiny")
    parser.add_argument("--iou", type=float, default=PUBLISHED_IOU, help="of the simulated segmenter")
    parser.add_argument("--cache")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folds", action="store_true", help="seeds 0 to 4 are test folds that cover all images")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and train nothing")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="of the table's scores")
    parser.add_argument("--csv", type=Path, help="also write what the tables are made of into this folder")
    args = parser.parse_args(argv)
    for labels, seed, arm in () if args.table else product(args.labels, args.seeds, args.arms):
        folder = args.out / f"{args.set}{'_liver' * (args.task == 'liver')}-{labels:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            if not (folder / f"{arm}.csv").exists() and is_locked(lock):
                run_arm(args, labels, seed, arm, folder)
    if args.csv:
        for name in ("results", "images", "objects"):
            read(args.out, name).to_csv(args.csv / f"{name}.csv", index=False, float_format="%.4f")
    print(table(args.out, args.split))


if __name__ == "__main__":
    main()
