"""What correcting a fifth of the pseudo masks is worth: the first of the audit's ranking, or random ones.

    python experiments/pseudo_label_audit/corrections.py OUT --runs RUNS --root KVASIR --weights MOBILENET_V2
    python experiments/pseudo_label_audit/corrections.py OUT_OR_CSV --table

RUNS is the folder of experiments/next_labels/run.py with its five runs, one a fold, which are read and not changed. A
new model is trained once on the run's labels and all pseudo masks of its round, a fifth of which (`--share`) the true
masks have replaced, and scored on the images of the fold:

    none      all pseudo masks as mined
    audit     those of the highest suspicion are replaced
    loss      those of the highest cross-entropy by the same witnesses
    random    as many random ones
    worst     those of the lowest true Dice: no ranking can choose better by this measure

OUT/cells/FOLD-ARM.csv has the Dice of each image. What is there is not repeated, a training resumes, and several
processes can share OUT.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import folds
from folds import NUM_FOLDS
from next_labels.run import NUM_LABELS, Fold
from pseudo_label_audit.run import other_rankings, true_dice
from recipe import run as recipe

from kmine.audit.evidence import MaskSet, held_out_predictions, load_reference_models, rank_all_masks
from kmine.audit.rounds import AuditedRun, open_audit
from kmine.data.resize import Resizer
from kmine.models.base import LocalModel
from kmine.ops.seeding import derive_seed
from kmine.setup.open import open_truth
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import make_fabric
from kmine.training.model_setup import new_model
from kmine.training.trainer import train

ARMS = ("none", "audit", "loss", "random", "worst")


def order_of(audited: AuditedRun, arm: str) -> list[str]:
    """Samples with a pseudo mask, in the order in which an arm corrects them."""
    ids = audited.audited_round.pseudo_labeled
    if arm == "random":
        return sorted(ids, key=lambda i: derive_seed("corrections", audited.name, i))
    if arm == "worst":
        return sorted(ids, key=true_dice(audited).__getitem__)
    if arm == "audit":
        ranked, _ = rank_all_masks(audited.task, audited.rounds, audited.audited_round, with_labeled=False)
        return [report.sample_id for report in ranked]
    loss = by_loss(audited)
    return sorted(ids, key=lambda i: -loss[i])


def by_loss(audited: AuditedRun) -> Mapping[str, float]:
    """Cross-entropy of each pseudo mask by the models that never learned it."""
    task, mined = audited.task, audited.audited_round
    references = load_reference_models(task, audited.rounds, mined.pseudo_labeled, train_folds=False)
    masks = MaskSet("pseudo", task.unlabeled.subset(mined.pseudo_labeled), audited.read("pseudo"), mined)
    size = Resizer.of(task.cfg.data)
    return {
        i: other_rankings(mean, size.mask(masks.read(i)))["loss"]
        for i, _, mean in held_out_predictions(task, references, masks)
    }


def trained(args: argparse.Namespace, fold: Fold, arm: str) -> tuple[LocalModel, int]:
    """The model of an arm and the number of masks that were corrected for it."""
    with open_audit(fold.run, recipe.Quiet(), device="cpu", data_root=args.root) as audited:
        mined, task = audited.audited_round, audited.task
        number = 0 if arm == "none" else round(args.share * len(mined.pseudo_labeled))
        corrected = frozenset(order_of(audited, arm)[:number] if number else ())
        truth, read = open_truth(task, audited.source), audited.read("pseudo")
        pool = task.unlabeled.with_masks(
            mined.pseudo_labeled, lambda i: truth.sample(i).mask if i in corrected else read(i)
        )
        folder = args.out / "trainings" / f"{fold.number}-{arm}"
        fit = replace(task.cfg.fit, round_steps=args.steps, round_lr=task.cfg.fit.lr)
        task = replace(
            task, cfg=replace(task.cfg, fit=fit), fabric=make_fabric("cpu", fit.precision), run=RunFolder(folder)
        )
        model, signature = new_model(task), f"{args.share} by {arm} of {mined.signature}"
        model.load_state_dict(train(task, model, round_idx=1, pseudo=pool, pseudo_signature=signature).best)
        task.run.close()
    shutil.rmtree(folder)
    return model, number


def cell(args: argparse.Namespace, fold: Fold, arm: str) -> pd.DataFrame:
    """Train and score an arm."""
    model, number = trained(args, fold, arm)
    ids = fold.parts["test"]
    dice = recipe.score(model, fold.pool(ids))
    print(f"fold {fold.number}, {arm}: {number} corrected, {np.mean(dice):.3f} on {len(ids)} images", flush=True)
    about = {"arm": arm, "fold": fold.number, "labels": NUM_LABELS, "corrected": number}
    return pd.DataFrame(
        [about | {"sample_id": i, "group": fold.groups[i], "dice": d} for i, d in zip(ids, dice, strict=True)]
    )


def table(source: Path) -> str:
    """Markdown of the cells of a folder or CSV."""
    return folds.table([folds.read_cells(source)], "random")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder; with --table also a CSV")
    parser.add_argument("--runs", type=Path, help="folder of experiments/next_labels")
    parser.add_argument("--root", help="folder of Kvasir-SEG")
    parser.add_argument("--weights", help="MobileNetV2 encoder weights (.safetensors)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(NUM_FOLDS)))
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--table", action="store_true", help="print the table of a folder or CSV; trains nothing")
    args = parser.parse_args()
    if args.table:
        return print(table(args.out))
    torch.set_num_threads(1)
    of_runs = argparse.Namespace(out=args.runs, root=args.root, weights=args.weights, steps=600, segmenter="tiny")
    return folds.write_cells(
        args.out, args.folds, args.arms, lambda number, arm: cell(args, Fold(of_runs, number), arm)
    )


if __name__ == "__main__":
    main()
