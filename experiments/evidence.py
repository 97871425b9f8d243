"""The figure of docs/evidence.md: the measured differences with their intervals, from the CSVs beside the experiments.

    python experiments/evidence.py docs/evidence.svg

Differences of Dice, paired by image; 95 % intervals over folds, each a training of its own, or of SKS over
images and six seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))
from folds import difference
from mining_engine.run import BASELINE, with_baseline
from sks import run as sks

from kmine.report.figures import GRID, MINING, svg_chart, svg_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
NAMES = {"sample_id": str, "group": str}
ENGINE = {
    "self_training": "self-training",
    "mining": "mining with tiny+adapted",
    "simulated": "mining with a simulation of IoU .85",
    "oracle": "true masks of all images",
}
"""Arms of experiments/mining_engine."""


class Row(NamedTuple):
    """One difference."""

    label: str
    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The label with its figures."""
        return f"{self.label}: {self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def _folds(path: str, arm: str, against: str, labels: int) -> tuple[float, ...]:
    """Mean and interval over folds of a difference at a number of labels."""
    rows = pd.read_csv(HERE / path, dtype=NAMES)
    found = difference(rows[rows["labels"] == labels], arm, against)
    return found.mean, *found.folds


def rows() -> Iterator[Row]:
    """The differences, from top to bottom."""
    cells = sks.read_cells(HERE / "sks/results.csv", "ct")
    for other, name in (("unetpp", "U-Net++"), ("shuffled+veto", "SKS with shuffled labels")):
        found = sks._gap(cells, other, "all")
        yield Row(f"SKS − {name}, phantom, 26 masks", found.difference, found.low, found.high)
    for labels in (60, 480):
        found = _folds("recipe/results.csv", "new", "old", labels)
        yield Row(f"training recipe − that of before, {labels} labels", *found)
    found = _folds("recipe/ingredients.csv", "new-without-five", "new-on-validation", 60)
    yield Row("without five of its parts, 60 labels", *found)
    cells = with_baseline(pd.read_csv(HERE / "mining_engine/results.csv", dtype=NAMES))
    cells = cells[(cells["split"] == "test") & (cells["checkpoint"] == "chosen") & (cells["labels"] == 15)]
    for arm, name in ENGINE.items():
        found = difference(cells.assign(fold=cells["seed"]), arm, BASELINE)
        yield Row(f"{name} − labels alone, 15 labels", found.mean, *found.folds)
    found = _folds("next_labels/results.csv", "chosen", "random", 70)
    yield Row("ten labels chosen by kmine next − ten random ones", *found)


def figure(found: Sequence[Row]) -> str:
    """As SVG: each difference as a point on its interval, its label and figures above it."""

    def draw(axes: Axes) -> None:
        for n, row in enumerate(found):
            face = MINING if row.low > 0 or row.high < 0 else "none"
            axes.plot((row.low, row.high), (n, n), "-", color=MINING, linewidth=2.5)
            axes.plot([row.mean], [n], "o", color=MINING, markerfacecolor=face, markersize=6)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(row.text, (0, n), (0, 7), size=8, **place)
        for name, face in (("interval without 0", MINING), ("0 is possible", "none")):
            axes.plot([], [], "o-", color=MINING, markerfacecolor=face, label=name)
        axes.axvline(0, color=GRID, linewidth=1.6)
        axes.set(xlabel="difference of Dice", ylim=(len(found) - 0.6, -0.8), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID)

    title = "Measured differences of Dice (two cores, 96 and 128 px)"
    return svg_file(svg_chart("evidence", title, draw, 1.5 + 0.42 * len(found)))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(figure(list(rows())), "utf-8")
