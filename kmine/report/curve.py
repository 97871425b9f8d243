"""The label-efficiency curve: Dice against the number of labels, a line per method, 95 % intervals as bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kmine.report.figures import MINING, STYLE, SUPERVISED, inline_svg

COLOURS = {"supervised": SUPERVISED, "mining": MINING, "self_training": "#2f9e6e", "mean_teacher": "#8b5fbf"}
COLOURS |= {"fixmatch": "#c8443f", "oracle": "#8d99a6"}
"""Line colours by the first word of a method's label; markers differ as well."""
OTHERS = ("#8a5a3c", "#f0b93a", "#e58aa7", "#7fb6e6")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class CurvePoint:
    """One method at one number of labels."""

    method: str
    """The method's label in tables."""
    model: str
    label_fraction: float
    num_labels: float
    """Labeled images, mean over seeds; the label fraction if their number is unknown."""
    dice: float
    """Mean over cases and seeds, on the test split; silence on a clean image counts 1 and a false alarm 0."""
    low: float
    """Lower end of the 95 % t-interval over groups and seeds; NaN if unknown."""
    high: float
    num_seeds: int


def label_efficiency(points: Sequence[CurvePoint], title: str) -> tuple[str, bytes]:
    """The chart as inline SVG and as PNG, empty without points; a panel per model, methods in the order of `points`."""
    if not points:
        return "", b""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(point.model for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "kmine"}):
        figure = Figure(figsize=(1.5 + 4.6 * len(models), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            _draw(axes, [point for point in points if point.model == model], methods)
            axes.set_title(model if len(models) > 1 else "", loc="left")
        panels[0].set_ylabel("test Dice, 95 % interval")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, fontsize=11)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
        return inline_svg(figure, "labels"), png.getvalue()


def _draw(axes: Any, points: Sequence[CurvePoint], methods: Sequence[str]) -> None:
    for number, method in enumerate(methods):
        own_points = sorted((p for p in points if p.method == method), key=lambda p: p.num_labels)
        if not own_points:
            continue
        word = method.split()[0].rstrip(",")
        colour = COLOURS.get(word, OTHERS[number % len(OTHERS)])
        # A small horizontal offset keeps intervals from covering each other.
        at = [p.num_labels * (1 + 0.012 * (number - len(methods) / 2)) for p in own_points]
        axes.plot(at, [p.dice for p in own_points], "--" if word == "oracle" else "-", color=colour, label=method,
                  marker=MARKERS[number % len(MARKERS)], markersize=5)  # fmt: skip
        ends = [[p.dice - p.low for p in own_points], [p.high - p.dice for p in own_points]]
        axes.errorbar(at, [p.dice for p in own_points], yerr=ends, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    ticks = {p.num_labels: p.label_fraction for p in points}
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{count:g}\n{fraction:.0%}" if count != fraction else f"{fraction:g}"
                                  for count, fraction in ticks.items()])  # fmt: skip
    axes.minorticks_off()
    axes.set_xlabel("labeled images")
    axes.grid(axis="y")
