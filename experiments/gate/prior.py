"""Weights of the ranked gate (`kmine.mining.rank.PRIOR`), fitted to calibrations of runs on several data sets.

    python experiments/gate/prior.py RUN [RUN ...]

Reads calibration/fold_*.json of finished runs; trains nothing and opens no data. Scores are standardised within each
run as the gate does it, Dice is taken minus the run's mean, and every data set weighs the same. A ridge regression over
all gives the weights, without one data set at a time their rank correlation beside that of the prior in use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.mining.calibration.fit import rank_correlation
from kmine.mining.rank import LIMIT, PRIOR, fit_ranking
from kmine.ops.calibrator import FEATURES, evidence_from_row, feature_rows, standardised

PENALTIES = (0.01, 0.1, 1.0)
"""Ridge penalties, per object; the one with the best mean correlation on data sets left out is taken."""


class Objects(NamedTuple):
    """Labeled objects of one run, scored by models that were not trained on them."""

    run: str
    dataset: str
    scores: NDArray[np.float64]
    """(N, F), standardised."""
    dice: NDArray[np.float64]
    """(N,) of the segmenter's masks."""


def read(run: Path) -> Objects:
    """The objects of a run folder."""
    info = json.loads((run / "run.json").read_text("utf-8"))
    folds = [json.loads(path.read_text("utf-8")) for path in sorted((run / "calibration").glob("fold_*.json"))]
    rows = [row for fold in folds for row in fold["objects"]]
    if not rows:
        raise SystemExit(f"{run}: expected calibration/fold_*.json of a calibrated run, found no objects")
    evidence = list(map(evidence_from_row, rows))
    ranking = fit_ranking(evidence, 1.0)
    z = standardised(feature_rows(evidence), np.array(ranking.centre), np.array(ranking.spread))
    dice = np.array([row["dice_segmenter"] for row in rows], float)
    return Objects(f"{run} ({info.get('segmenter')})", str(info.get("dataset")), np.clip(z, -LIMIT, LIMIT), dice)


def fit(runs: Sequence[Objects], penalty: float) -> NDArray[np.float64]:
    """(F,) weights; a score that no run has gets 0."""
    gram, target = np.zeros((len(FEATURES),) * 2), np.zeros(len(FEATURES))
    for name in {run.dataset for run in runs}:
        own = [run for run in runs if run.dataset == name]
        x = np.concatenate([run.scores - run.scores.mean(axis=0) for run in own])
        y = np.concatenate([run.dice - run.dice.mean() for run in own])
        gram, target = gram + x.T @ x / len(x), target + x.T @ y / len(x)
    return np.linalg.solve(gram + penalty * np.eye(len(FEATURES)), target)


def left_out(runs: Sequence[Objects], penalty: float) -> list[float]:
    """Rank correlation with Dice in each run, by weights of the other data sets."""
    others = ([other for other in runs if other.dataset != run.dataset] for run in runs)
    return [rank_correlation(run.scores @ fit(rest, penalty), run.dice) for run, rest in zip(runs, others, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the weights and what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = [read(path) for path in parser.parse_args(argv).runs]
    prior = [rank_correlation(run.scores @ np.array(astuple(PRIOR)), run.dice) for run in runs]
    penalty, fitted = PENALTIES[-1], [float("nan")] * len(runs)
    if len({run.dataset for run in runs}) > 1:
        penalty = max(PENALTIES, key=lambda p: np.nanmean(left_out(runs, p)))
        fitted = left_out(runs, penalty)
    weights = fit(runs, penalty)
    for run, of_prior, of_fit in zip(runs, prior, fitted, strict=True):
        correlations = f"{of_prior:.2f} by the prior in use, {of_fit:.2f} by weights of the other data sets"
        print(f"{run.run}: {len(run.dice)} objects of {run.dataset}, rank correlation {correlations}")
    scale = np.abs(weights).sum() / max(np.count_nonzero(weights), 1)
    print(f"ridge penalty {penalty}; weights, of mean size 1:")
    for name, weight in zip(FEATURES, weights / (scale or 1.0), strict=True):
        print(f"  {name} {weight:+.2f}")


if __name__ == "__main__":
    main()
