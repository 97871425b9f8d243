"""How often a design finds a gain: five folds over all images against one test split, by simulation.

    python experiments/power.py experiments/recipe/ingredients_c51a633.csv --labels 60
    python experiments/power.py CASES.csv --gains 0 0.02 0.03

CASES.csv has columns arm, fold, labels, group, sample_id and dice, as experiments/recipe writes them. From every pair
of arms the spread of paired differences is estimated: between images, and between trainings (folds) beyond what their
images explain. Differences are then drawn with these spreads and a given mean gain, and the share of 95 % intervals
above zero is counted. With a gain of 0 that share should be .025; a design is honest where it is, and strong where a
gain of .03 is found four times in five.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit


class Spread(NamedTuple):
    """Standard deviations of paired differences."""

    images: float
    trainings: float


class Design(NamedTuple):
    """Trainings, and the images that each is tested on; `shared`: all trainings on the same images."""

    name: str
    trainings: int
    images: int
    shared: bool


DESIGNS = (
    Design("one split, 75 images, 3 seeds", 3, 75, True),
    Design("one split, 120 images, 5 seeds", 5, 120, True),
    Design("five folds, 600 images, one seed", 5, 120, False),
)


def spread_of(cases: pd.DataFrame, first: str, second: str) -> Spread:
    """Of the two arms' differences; groups of near-duplicates count as one image."""
    wide = cases[cases.arm.isin((first, second))].pivot_table(index=["fold", "group"], columns="arm", values="dice")
    gap = (wide[second] - wide[first]).dropna()
    within = gap.groupby("fold").var()
    counts = gap.groupby("fold").size()
    images = float((within * (counts - 1)).sum() / (counts - 1).sum())
    between = float(gap.groupby("fold").mean().var() - (images / counts).mean())
    return Spread(images**0.5, max(between, 0.0) ** 0.5)


def found(design: Design, spread: Spread, gain: float, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Shares of intervals above zero: over images with the trainings as given, and over trainings."""
    shape = (draws, design.trainings, design.images)
    # Half of an image's difference is the image's own, the other half that of the training on it: own assumption.
    own = rng.normal(0, spread.images / 2**0.5, (draws, 1 if design.shared else design.trainings, design.images))
    gaps = gain + own + rng.normal(0, spread.images / 2**0.5, shape)
    gaps += rng.normal(0, spread.trainings, (draws, design.trainings, 1))
    by_image = gaps.mean(axis=1) if design.shared else gaps.reshape(draws, -1)
    return _share_above(by_image), _share_above(gaps.mean(axis=2))


def _share_above(values: np.ndarray) -> float:
    """Share of the (draws, N) rows whose 95 % t-interval of the mean lies above zero."""
    count = values.shape[1]
    half = stdtrit(count - 1, 0.975) * values.std(axis=1, ddof=1) / count**0.5
    return float((values.mean(axis=1) - half > 0).mean())


def main() -> None:
    """Print the spreads of all pairs of arms, and the table of designs at the median spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--labels", type=int, default=60)
    parser.add_argument("--gains", nargs="+", type=float, default=[0.0, 0.02, 0.03])
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    cases = pd.read_csv(args.cases, dtype={"group": str, "sample_id": str})
    cases = cases[cases.labels == args.labels]
    folds = cases.groupby("arm").fold.nunique()
    arms = sorted(folds.index[folds == folds.max()])
    spreads = [spread_of(cases, *pair) for pair in combinations(arms, 2)]
    median = Spread(*np.median(np.array(spreads), axis=0))
    print(f"{len(spreads)} pairs of {len(arms)} arms, {args.labels} labels: standard deviation of the differences")
    print(f"  between images {median.images:.3f}, between trainings {median.trainings:.3f} (medians)")
    print("| design | gain | over images | over trainings |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for design in DESIGNS:
        for gain in args.gains:
            shares = found(design, median, gain, args.draws, rng)
            print(f"| {design.name} | {gain:g} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
