"""Training curves of a run: validation score and loss against the optimizer step, a colour per arm."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from kmine.report.figures import MINING, SUPERVISED, svg_chart, svg_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HistoryTuple = tuple[str, int, int, float, float]
"""(arm, round, step, loss, score): the first columns of history.csv."""
LOOP = "mining"
"""Arm of the loop itself; its round 0 is that of the other arms, too, which have none."""
CURVES = "curves.svg"
"""Name of the picture in a run folder."""
HELPERS = re.compile(r"(fold|part)_\d+|classifier|witness(_.*)?")
"""Trainings of parts of the data and of other networks, which are not drawn."""
COLOURS = {LOOP: MINING, "supervised": SUPERVISED, "supervised_once": "#8a5a3c"}
OTHERS = ("#2f9e6e", "#8b5fbf", "#c8443f", "#f0b93a", "#5c6773", "#e58aa7")


def training_chart(history: Sequence[HistoryTuple], retrained: Collection[int] = ()) -> str | None:
    """Score above loss, as inline SVG; None without a training.

    A round begins where the last one of its arm ended; models trained in one schedule, `retrained` rounds and arms
    named ..._once, begin at step 0.
    """
    lines = _lines(history, retrained)
    if not lines:
        return None
    arms = list(dict.fromkeys(arm for arm, *_ in lines))

    def draw(axes: Any) -> None:
        panels: list[Axes] = list(axes)
        for arm, steps, losses, scores in lines:
            colour = COLOURS.get(arm) or OTHERS[arms.index(arm) % len(OTHERS)]
            label = None if arm in panels[0].get_legend_handles_labels()[1] else arm
            for panel, values in zip(panels, (scores, losses), strict=True):
                name = label if panel is panels[0] else None
                panel.plot(steps, values, "-", color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
        panels[0].set_ylabel("validation score")
        panels[1].set(ylabel="training loss", xlabel="optimizer step")
        for panel in panels:
            panel.grid(axis="y")

    return svg_chart("curves", "Training curves", draw, height=5.6, panels=2)


def curves_picture(history: Sequence[HistoryTuple], retrained: Collection[int] = ()) -> str:
    """The chart as an SVG file of its own; empty without a training."""
    return svg_file(training_chart(history, retrained) or "")


def _lines(
    history: Sequence[HistoryTuple], retrained: Collection[int]
) -> list[tuple[str, list[int], list[float], list[float]]]:
    """(arm, steps, losses, scores) of each training."""
    trainings: dict[tuple[str, int], list[HistoryTuple]] = {}
    for row in history:
        if not HELPERS.fullmatch(row[0]):
            trainings.setdefault((row[0], row[1]), []).append(row)
    ends: dict[str, int] = {}
    lines, first = [], 0
    for (arm, round_idx), rows in sorted(trainings.items(), key=lambda item: item[0][1]):
        is_fresh = round_idx == 0 or round_idx in retrained or arm.endswith("_once")
        start = 0 if is_fresh else ends.get(arm, first)
        ends[arm] = start + rows[-1][2]
        first = ends[arm] if (arm, round_idx) == (LOOP, 0) else first
        steps, losses, scores = (list(column) for column in zip(*(row[2:] for row in rows), strict=True))
        lines.append((arm, [start + step for step in steps], losses, scores))
    return lines
