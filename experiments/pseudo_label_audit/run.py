"""How many wrong masks the audit's ranking finds, planted ones and those that mining made, beside other rankings.

    python experiments/pseudo_label_audit/run.py OUT --runs RUN ... [--shares 0.05 0.1 0.2] [--plantings 1]
    python experiments/pseudo_label_audit/run.py OUT_OR_CSV --table

In finished runs of `kmine loop`, a share of the pseudo masks of the audited round, and of the given masks, is replaced
by wrong ones of eight kinds in turns (tests/helpers/planted_faults.py); a replacement that is still too much like the
mask is drawn anew. The run folders are not changed: the replaced masks are handed to the audit's own functions. The
scores of the gate stay those of the mask that was there, so that only the picture and the models can tell. No witness
of the audit has learned the mask it is asked about, and the others had the true masks.

The rankings beside the audit's (`suspicion`) have the same witnesses, the mean probabilities p of the held-out models
at the size of training: `cleanlab`, minus the soft minimum over pixels (temperature .1) of p of the mask's class, as
cleanlab ranks segmentation masks (Lad and Mueller 2023, arXiv 2307.05080); `loss`, the mean cross-entropy; `entropy`,
that of p alone. Ignored pixels count for none of them.

OUT/masks.csv has a row a mask: where it stands by each ranking, its fault, and, of pseudo masks that nothing was
planted in, true Dice, for which the withheld masks are read; OUT/parts/RUN.csv has the audit's signals, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import rankdata, spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.planted_faults import KINDS, Mask, likeness, object_of, plant

from kmine.audit import evidence
from kmine.audit.evidence import MaskSet
from kmine.audit.reports import MaskReport, MaskReports
from kmine.audit.rounds import AuditedRun, open_audit
from kmine.cli import Terminal
from kmine.data.resize import Resizer
from kmine.ops import metrics
from kmine.setup.open import open_truth
from kmine.types import IGNORE_INDEX

RANKINGS = ("suspicion", "cleanlab", "loss", "entropy")
TEMPERATURE = 0.1
TOP = (0.1, 0.2)
"""First shares of a ranking that are counted."""
WRONG = 0.6
"""True Dice below which a mask that mining made counts as wrong."""


def other_rankings(mean: NDArray[np.float32], mask: Mask) -> dict[str, float]:
    """Scores of (H, W) class ids and 255 by (K, H, W) probabilities; higher is more suspicious."""
    known = mask != IGNORE_INDEX
    p = np.clip(mean.reshape(len(mean), -1)[:, known.ravel()].astype(float), 1e-7, 1)
    if not p.size:
        return {"cleanlab": -1.0, "loss": 0.0, "entropy": 0.0}
    own = p[mask[known], np.arange(p.shape[1])]
    return {
        "cleanlab": -float(softmax((1 - own) / TEMPERATURE) @ own),
        "loss": float(-np.log(own).mean()),
        "entropy": float(-(p * np.log(p)).sum(0).mean()),
    }


def audit_run(run: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plant, rank, and say of every mask where it came to stand."""
    terminal = Terminal()
    with open_audit(run, terminal, device="cpu", data_root=args.root) as audited:
        task, mined = audited.task, audited.audited_round
        references = evidence.load_reference_models(task, audited.rounds, mined.pseudo_labeled, train_folds=True)
        sets = [
            MaskSet("pseudo", task.unlabeled.subset(mined.pseudo_labeled), audited.read("pseudo"), mined),
            MaskSet("labeled", task.labeled, audited.read("labeled")),
        ]
        seen = [list(evidence.held_out_predictions(task, references, masks)) for masks in sets]
        dice_of, rows = true_dice(audited), []
        kinds = [kind for kind in KINDS if kind != "swapped class" or task.num_classes > 2]
        for share in args.shares:
            for planting in range(args.plantings):
                about = {"run": run.name, "share": share, "planting": planting}
                rng = np.random.default_rng([round(100 * share), planting, args.seed])
                reports, scores, faults = {}, {}, {}
                for masks, predictions in zip(sets, seen, strict=True):
                    right = {i: masks.read(i) for i in masks.pool.ids}
                    wrong = plant(right, share, rng, kinds)
                    faults[masks.kind] = {i: (kind, likeness(new, right[i])) for i, (kind, new) in wrong.items()}
                    now = right | {i: new for i, (_, new) in wrong.items()}
                    changed = MaskSet(masks.kind, masks.pool, now.__getitem__, masks.mined_round)
                    reports[masks.kind] = MaskReports(
                        evidence.score_mask(task, held, changed, i, mean) for i, held, mean in predictions
                    )
                    size = Resizer.of(task.cfg.data)
                    scores[masks.kind] = {i: other_rankings(mean, size.mask(now[i])) for i, _, mean in predictions}
                for kind, other in (("pseudo", "labeled"), ("labeled", "pseudo")):
                    found = reports[kind].ranked(reports[other].shapes)
                    dice = dice_of if kind == "pseudo" else {}
                    rows += [about | row for row in _rows(found, scores[kind], faults[kind], dice)]
        terminal.stop()
    return rows


def _rows(
    found: Sequence[MaskReport],
    scores: Mapping[str, Mapping[str, float]],
    faults: Mapping[str, tuple[str, float]],
    dice: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """A row a mask; `faults`: kind, and likeness to what was replaced."""
    places = _places({report.sample_id: {"suspicion": report.suspicion} | scores[report.sample_id] for report in found})
    for report in found:
        fault, alike = faults.get(report.sample_id, ("none", np.nan))
        true = dice.get(report.sample_id, np.nan) if fault == "none" else np.nan
        what = {"kind": report.kind, "sample_id": report.sample_id, "fault": fault, "alike": alike, "dice": true}
        signals = {f"signal_{name}": value for name, value in report.signals.items()}
        yield what | places[report.sample_id] | signals


def _places(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By mask: its place in each ranking, as a share; 0 is the most suspicious."""
    frame = pd.DataFrame.from_dict(scores, orient="index")
    return (frame.rank(ascending=False, method="first") / len(frame)).round(5).to_dict("index")


def true_dice(audited: AuditedRun) -> dict[str, float]:
    """Dice of the pseudo masks that have a withheld mask, over the pixels that they do not ignore."""
    truth, read, out = open_truth(audited.task, audited.source), audited.read("pseudo"), {}
    for sample_id in {*audited.audited_round.pseudo_labeled} & {*truth.ids}:
        mask, true = read(sample_id), truth.sample(sample_id).mask
        valid = mask != IGNORE_INDEX
        out[sample_id] = metrics.dice(object_of(mask) & valid, object_of(true) & valid)
    return out


def auc(place: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive stands before a negative."""
    places, num = rankdata(-place), int(positive.sum())
    rest = len(place) - num
    return float((places[positive].sum() - num * (num + 1) / 2) / (num * rest)) if num and rest else float("nan")


def table(source: Path) -> str:
    """Markdown: planted faults found in the first tenth and fifth by each ranking, then the masks that mining made.

    Rows of a single kind are of the shares that a tenth can hold.
    """
    frame = pd.read_csv(source / "masks.csv" if source.is_dir() else source, dtype={"sample_id": str})
    heads = [f"{name}, first {top:.0%}" for name in RANKINGS for top in TOP]
    lines = [f"| masks | fault | planted | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for kind in ("pseudo", "labeled"):
        part = frame[(frame["kind"] == kind) & (frame["fault"] != "none")]
        groups = [(f"all, {share:.0%} planted", rows) for share, rows in part.groupby("share")]
        groups += [(fault, part[(part["fault"] == fault) & (part["share"] <= TOP[0])]) for fault in KINDS]
        for name, rows in groups:
            found = [f"{(rows[ranking] <= top).mean():.0%}" for ranking in RANKINGS for top in TOP]
            lines += [f"| {kind} | {name} | {len(rows)} | {' | '.join(found)} |"] if len(rows) else []
    made = frame[frame["dice"].notna() & (frame["planting"] == 0) & (frame["share"] == frame["share"].min())]
    heads = ["ranking", "masks", f"wrong (Dice below {WRONG})", *(f"in the first {top:.0%}" for top in TOP), "AUC",
             "rank correlation with Dice"]  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in RANKINGS:
        wrong = (made["dice"] < WRONG).to_numpy()
        found = [f"{(made[name][wrong] <= top).mean():.0%}" for top in TOP]
        by_run = [(auc(one[name].to_numpy(), (one["dice"] < WRONG).to_numpy()),
                   spearmanr(one[name], one["dice"]).statistic) for _, one in made.groupby("run")]  # fmt: skip
        figures = [f"{value:.2f}" for value in np.nanmean(by_run, axis=0)]
        lines.append(f"| {' | '.join([name, str(len(made)), str(wrong.sum()), *found, *figures])} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder; with --table also a CSV")
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--plantings", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="draws what is planted where")
    parser.add_argument("--data.root", dest="root", help="where the data lie now, if they were moved")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    if not args.table:
        (args.out / "parts").mkdir(parents=True, exist_ok=True)
        for run in args.runs:
            path = args.out / "parts" / f"{run.name}.csv"
            if not path.exists():
                pd.DataFrame(audit_run(run, args)).to_csv(path, index=False, float_format="%.4f")
        parts = [pd.read_csv(path, dtype={"sample_id": str}) for path in sorted((args.out / "parts").glob("*.csv"))]
        masks = pd.concat(parts)
        masks.loc[:, ~masks.columns.str.startswith("signal_")].to_csv(args.out / "masks.csv", index=False)
    print(table(args.out))


if __name__ == "__main__":
    main()
