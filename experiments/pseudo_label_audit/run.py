"""How many planted faults the audit's ranking finds: wrong pseudo masks and wrong given labels in finished runs.

    python experiments/pseudo_label_audit/run.py OUT --runs RUN ... [--settings FILE.yaml --seeds SEED ...] \\
        [--plantings 3] [--share 0.1] [--data.root FOLDER] [--withheld]
    python experiments/pseudo_label_audit/run.py OUT --table     # the tables of what is there, from OUT/masks.csv

Each run folder is copied to OUT. In the copy a tenth of the pseudo masks of the audited round, and of the given masks,
is replaced, in turns: shifted by half of its width and height; dilated by half the radius of a disc of its area;
swapped for another image's. A replacement that is still alike (Dice above 0.7) is drawn anew. The scores in the table
of decisions stay those of the mask that was there, so that nothing but the picture and the models can tell; models that
learned the true mask are no witnesses, in the audit as here. The given masks are replaced for the audit alone: the
models of the parts were trained before, with the true masks of the other parts.

`--withheld` also says what the ranking makes of the masks that mining itself got wrong: the withheld masks are read for
that, after the ranking is done. `--settings`: the config.yaml of run folders that have none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.planted_faults import KINDS, Mask, object_of, plant

from kmine import cli
from kmine.audit.evidence import (
    MaskReport,
    rank_all_masks,
)
from kmine.audit.rounds import load_rounds, select_round
from kmine.config import LoopConfig
from kmine.io.files import write_atomic
from kmine.ops import metrics
from kmine.setup.open import open_for_audit, open_withheld
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import encode_table
from kmine.store.tables import MaskRow
from kmine.types import IGNORE_INDEX

TOP = 0.2
WRONG = 0.6
"""True Dice below which a mask that mining made counts as wrong."""


def audit_once(run: Path, out: Path, planting: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plant, rank, and say of every mask where it came to stand."""
    copy = out / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    if args.settings and not (copy / "config.yaml").exists():
        shutil.copy(args.settings, copy / "config.yaml")
    words = ["--config", str(copy / "config.yaml"), "--device", "cpu", "--data.on_fault", "say"]
    words += ["--data.root", args.root] if args.root else []
    words += ["--data.cache_dir", args.cache] if args.cache else []
    words += ["--seed", str(args.seed_of(run))] if args.settings else []
    cfg = cli.parse(LoopConfig, words, prog="run.py", description="")
    source, store, terminal = preflight(cfg), RunFolder(copy), cli.Terminal()
    task = open_for_audit(cfg, source, store, terminal)
    past = load_rounds(store)
    this = select_round(past, None, copy)
    rng = np.random.default_rng([planting, args.seed])
    pseudo = {i: store.pseudo_mask(this.round_idx, i) for i in this.pseudo_labeled}
    given = {i: task.labeled.sample(i).mask for i in task.labeled.ids}
    wrong, wrong_given = plant(pseudo, args.share, rng), plant(given, args.share, rng)
    masks = pseudo | {name: mask for name, (_, mask) in wrong.items()}
    rows = [MaskRow.from_mask(name, mask) for name, mask in masks.items()]
    folder = store.round_dir(this.round_idx) / "pseudo_masks"
    for path in folder.glob("*"):
        path.unlink()
    write_atomic(folder / "00000.parquet", encode_table(rows, MaskRow, this.signature))
    store.masks.cache_clear()

    def as_given(sample_id: str) -> Mask:
        return wrong_given[sample_id][1] if sample_id in wrong_given else given[sample_id]

    labeled = task.labeled.with_masks(task.labeled.ids, as_given)
    ranked = rank_all_masks(task, past, this, with_labeled=True, labeled=labeled)
    truth = open_withheld(task, source) if args.withheld else None
    rows = []
    for found, faults, real in zip(ranked, (wrong, wrong_given), (pseudo, given), strict=True):
        for one in found:
            fault = faults.get(one.sample_id, ("none", None))
            dice = metrics.dice(object_of(fault[1]), object_of(real[one.sample_id])) if fault[1] is not None else np.nan
            true_dice = np.nan
            if truth is not None and one.kind == "pseudo" and one.sample_id in truth.ids and fault[1] is None:
                true_dice = _true_dice(real[one.sample_id], truth.sample(one.sample_id).mask)
            rows.append(_row(run, planting, one, fault[0], len(found), dice) | {"true_dice": true_dice})
    store.close()
    terminal.stop()
    return rows


def _true_dice(mask: Mask, truth: Mask) -> float:
    valid = mask != IGNORE_INDEX
    return metrics.dice(object_of(mask) & valid, object_of(truth) & valid)


def _row(run: Path, planting: int, one: MaskReport, fault: str, count: int, dice: float) -> dict[str, Any]:
    return {
        "run": run.parent.name if run.name == "mining" else run.name,
        "planting": planting,
        "kind": one.kind,
        "sample_id": one.sample_id,
        "fault": fault,
        "place": one.rank / count,
        "suspicion": round(one.suspicion, 4),
        "dice_with_replaced": round(dice, 4),
        "witnesses": len(one.model_names),
        **{name: round(value, 5) for name, value in one.signals.items()},
    }


def auc(values: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive stands above a negative."""
    places, num = rankdata(values), int(positive.sum())
    rest = len(values) - num
    return float((places[positive].sum() - num * (num + 1) / 2) / (num * rest)) if num and rest else float("nan")


def tables(frame: pd.DataFrame) -> str:
    """Markdown: share of planted faults in the first fifth, by kind of mask and of fault; AUC within each planting."""
    lines = ["| masks | fault | planted | Dice with what was replaced | in the first 20 % | AUC, mean over plantings |"]
    lines.append("|---|---|---|---|---|---|")
    for kind in ("pseudo", "labeled"):
        part = frame[frame["kind"] == kind]
        for fault in ("all", *KINDS):
            bad = part[(part["fault"] != "none") if fault == "all" else (part["fault"] == fault)]
            values = []
            for _, one in part.groupby(["run", "planting"]):
                is_bad = (one["fault"] != "none") if fault == "all" else (one["fault"] == fault)
                use = is_bad | (one["fault"] == "none")
                values.append(auc(one["suspicion"].to_numpy()[use], is_bad.to_numpy()[use]))
            found = f"{(bad['place'] <= TOP).mean():.0%} ({(bad['place'] <= TOP).sum()} of {len(bad)})"
            dice = f"{bad['dice_with_replaced'].mean():.2f}"
            lines.append(f"| {kind} | {fault} | {len(bad)} | {dice} | {found} | {np.nanmean(values):.3f} |")
    natural = frame[(frame["kind"] == "pseudo") & frame["true_dice"].notna() & (frame["planting"] == 0)]
    if len(natural):
        lines += [
            "",
            "| run | masks that mining made | wrong (Dice < 0.6) | of these in the first 20 % | AUC | Spearman |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for run, one in natural.groupby("run"):
            bad = (one["true_dice"] < WRONG).to_numpy()
            rho = spearmanr(one["suspicion"], -one["true_dice"]).statistic
            area = auc(one["suspicion"].to_numpy(), bad)
            top = f"{(one['place'][bad] <= TOP).mean():.0%}" if bad.any() else "–"
            lines.append(f"| {run} | {len(one)} | {bad.sum()} | {top} | {area:.3f} | {rho:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="with --settings: the seed of each run, in order")
    parser.add_argument("--plantings", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="draws what is planted where")
    parser.add_argument("--data.root", dest="root")
    parser.add_argument("--cache")
    parser.add_argument("--withheld", action="store_true", help="also hold the ranking against the withheld masks")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    args.seed_of = lambda run: (args.seeds or [0] * len(args.runs))[args.runs.index(run)]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "masks.csv"
    if not args.table:
        rows: list[dict[str, Any]] = []
        for run in args.runs:
            for planting in range(args.plantings):
                rows += audit_once(run, args.out, planting, args)
                pd.DataFrame(rows).to_csv(path, index=False)  # what a stopped session has done is there
        shutil.rmtree(args.out / "copy", ignore_errors=True)
    frame = pd.read_csv(path, dtype={"sample_id": str})
    bad = frame[frame["fault"] != "none"]
    summary = bad.assign(found=bad["place"] <= TOP).groupby(["run", "planting", "kind", "fault"])["found"]
    summary.agg(["sum", "count"]).reset_index().to_csv(args.out / "results.csv", index=False)
    sys.stdout.write(tables(frame) + "\n")


if __name__ == "__main__":
    main()
