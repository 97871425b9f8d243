"""What weights of the audit's ranking are worth: today's, given ones, and each signal alone.

    python experiments/pseudo_label_audit/weights.py OUT --runs 0 1 [--kind labeled] [--weights conflict=8 ...]

Reads OUT/parts/RUN.csv of run.py. Means over runs and shares of 5 and 10 %: AUC of planted faults, their share in the
first tenth, and, of pseudo masks, AUC of those with a true Dice below .6 among what mining made (of 5 % planted, these
left out). Weights that are not given are 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from run import TOP, WRONG, auc

from kmine.audit import ranking

PREFIX = "signal_"


def figures(frames: Sequence[pd.DataFrame], weights: Mapping[str, float]) -> list[float]:
    """AUC of planted faults, their share in the first tenth, AUC of wrong masks; a frame: one kind, run and share."""
    found = []
    for frame in frames:
        columns = frame.filter(like=PREFIX).rename(columns=lambda name: name.removeprefix(PREFIX))
        signals = {name: columns[name].to_numpy(float) for name in columns}
        scores = ranking.label_issue_scores(signals, np.zeros(len(frame), bool), weights)[0]
        place = pd.Series(-scores).rank(method="first").to_numpy() / len(frame)
        planted, wrong = (frame["fault"] != "none").to_numpy(), (frame["dice"] < WRONG).to_numpy()
        made = (frame["dice"].notna() & (frame["share"] == min(f["share"].iloc[0] for f in frames))).to_numpy()
        found.append((auc(place, planted), (place[planted] <= TOP[0]).mean(), auc(place[made], wrong[made])))
    return pd.DataFrame(found).mean().tolist()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", nargs="+", required=True, help="names of runs")
    parser.add_argument("--kind", choices=("pseudo", "labeled"), default="pseudo")
    parser.add_argument("--weights", nargs="*", default=[], metavar="SIGNAL=WEIGHT")
    args = parser.parse_args()
    rows = pd.concat([pd.read_csv(args.out / "parts" / f"{name}.csv") for name in args.runs])
    rows = rows[(rows["kind"] == args.kind) & (rows["share"] <= TOP[0])]
    frames = [frame.reset_index(drop=True) for _, frame in rows.groupby(["run", "share", "planting"])]
    today = ranking.WEIGHTS if args.kind == "pseudo" else ranking.GIVEN_WEIGHTS
    given = {name: float(value) for name, _, value in (word.partition("=") for word in args.weights)}
    sets = {"today": today, "given": given, **{f"{name} alone": {name: 1.0} for name in today}}
    for name, weights in sets.items():
        if weights:
            print(f"{name:20}", " ".join("–" if np.isnan(x) else f"{x:.3f}" for x in figures(frames, weights)))


if __name__ == "__main__":
    main()
