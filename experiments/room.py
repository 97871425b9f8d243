"""How much room mining has: the same network on all labels against the labels that there are, on the test split.

    python experiments/room.py FEW_LABELS_COMPARE_FOLDER ALL_LABELS_COMPARE_FOLDER

Both folders hold the test_cases.csv that `kmine compare ... --out FOLDER` writes, of as many seeds; runs are paired in
the order in which they were named. Prints the mean test score of the two and the paired difference: Dice, in which
silence on a clean image counts 1 and a false alarm 0, so that both are means over the same images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from kmine.ops.statistics import paired_difference, score_empty_cases


def scores(folder: Path, arm: str) -> np.ndarray:
    """(runs, images) scores of the checkpoint chosen on validation, images in the order of their ids."""
    cases = pd.read_csv(folder / "test_cases.csv")
    cases = cases[(cases["arm"] == arm) & (cases["checkpoint"] == "chosen")]
    by_run = [rows.sort_values("sample_id") for _, rows in cases.groupby("run", sort=False)]
    if "score" in cases:
        return np.stack([rows["score"].to_numpy(float) for rows in by_run])
    return score_empty_cases(np.stack([rows["dice"].to_numpy(float) for rows in by_run]))  # tables of older code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("few", type=Path)
    parser.add_argument("all", type=Path)
    args = parser.parse_args()
    ceiling = scores(args.all, "supervised, round 0")
    for arm in ("supervised, round 0", "supervised, equal steps", "mining"):
        few = scores(args.few, arm)
        gap = paired_difference(few, ceiling, seed=0)
        print(
            f"{arm}: {few.mean():.3f}; all labels: {ceiling.mean():.3f}; "
            f"room {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {len(few)} seeds"
        )


if __name__ == "__main__":
    main()
