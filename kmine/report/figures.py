"""Charts as SVG, inline or a file of its own: text remains text, lines follow a light or dark surface."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kmine.report.inputs import Calibrated, RoundRow
from kmine.report.table import has_baseline
from kmine.types import none_to_nan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MINING, SUPERVISED = "#2f80c9", "#d97b1f"
WIDTH = 5.6
"""Inches. Pages scale a chart to the column, so a narrow chart has legible text on a phone."""

INK, GRID = "#010203", "#8d99a6"
"""Ink is a placeholder for the colour of the text around, so that one drawing serves light and dark pages; the grey of
grids and axes is visible on both."""
_SURFACE = "svg{color:#1c2733}@media screen and (prefers-color-scheme:dark){svg{color:#e4e9f0;background:#12161c}}"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GRID, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "grid.alpha": 0.6,
    "legend.frameon": False, "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip


def dice_chart(rows: Sequence[RoundRow], segmenter: str) -> str:
    """Validation Dice per round, with the supervised baseline at equal optimizer steps.

    Models trained in one schedule, the retrained one and the baseline, are no round: points beside the lines.
    """
    series_name = f"mining ({segmenter})" if any(row.round_idx for row in rows) else "labels only"
    chain = [row for row in rows if not row.retrained]
    series = [
        (f"{series_name}, checkpoint in use", MINING, "-", [row.dice for row in chain]),
        (f"{series_name}, last step", MINING, "--", [row.dice_final for row in chain]),
    ]
    if has_baseline(rows):
        series += [
            ("supervised, checkpoint in use", SUPERVISED, "-", [none_to_nan(row.supervised_dice) for row in chain]),
            ("supervised, last step", SUPERVISED, "--", [none_to_nan(row.supervised_dice_final) for row in chain]),
        ]
    once = [(f"{series_name}, trained once", MINING, row.round_idx, row.dice) for row in rows if row.retrained]
    baselines = [
        (row.round_idx, row.by_model["supervised_once"][0]) for row in rows if "supervised_once" in row.by_model
    ]
    once += [("supervised, one schedule", SUPERVISED, *point) for point in baselines]

    def draw(axes: Axes) -> None:
        at = [row.round_idx for row in rows]
        for label, colour, line, values in series:
            face = colour if line == "-" else "none"
            options = {"marker": "o", "markersize": 5, "markerfacecolor": face, "label": label}
            axes.plot(at[: len(values)], values, line, color=colour, **options)
        for label, colour, place, value in once:
            axes.plot([place], [value], "D", color=colour, markersize=7, label=label)
        refused = [row for row in rows if not row.adopted]
        if refused:
            where = [row.round_idx for row in refused]
            axes.plot(where, [row.dice for row in refused], "x", color=INK, markersize=10, label="not adopted")
        names = ["once" if row.retrained else row.round_idx for row in rows]
        axes.set(xlabel="round", ylabel="Dice", xticks=at, xticklabels=names)
        axes.grid(axis="y")

    return svg_chart("dice", f"Validation Dice (segmenter: {segmenter})", draw, height=4.9, legend_columns=1)


def coverage_chart(calibration: Calibrated | None) -> str | None:
    """Mean Dice of the accepted masks against their share; None if the gate is not calibrated."""
    if calibration is None:
        return None

    def draw(axes: Axes) -> None:
        shares, means = zip(*calibration.risk_coverage, strict=True)
        axes.plot(shares, means, "-", color=MINING, label="mean Dice of the accepted")
        axes.axvline(calibration.coverage, color=SUPERVISED, linestyle="--", label="the gate's threshold")
        axes.axhline(calibration.target, color=INK, linestyle=":", label="target")
        axes.set(xlabel="share of the objects accepted", ylabel="Dice", xlim=(0, 1.02))
        axes.grid(axis="y")

    return svg_chart("coverage", "Labeled objects treated as unlabeled: quality against coverage", draw, height=3.6)


def reliability_chart(calibration: Calibrated | None) -> str | None:
    """True against estimated Dice, in bins of about equal counts; None if the gate is not calibrated."""
    title = "Labeled objects treated as unlabeled: estimated and true Dice"
    return calibration and reliability_svg("reliability", title, calibration.reliability, "objects")


def reliability_svg(name: str, title: str, bins: Sequence[tuple[float, float, int]], noun: str) -> str:
    """True against estimated Dice: (mean estimate, mean Dice, count) of bins of `noun`."""

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), ":", color=INK, label="perfect calibration")
        estimates, means, counts = zip(*bins, strict=True)
        axes.plot(estimates, means, "o-", color=MINING, label=f"bins of {min(counts)} to {max(counts)} {noun}")
        axes.set(xlabel="estimated Dice", ylabel="true Dice", xlim=(0, 1), ylim=(0, 1))
        axes.grid()

    return svg_chart(name, title, draw, height=3.6)


def svg_chart(
    name: str, title: str, draw: Callable[[Any], None], height: float, legend_columns: int = 2, panels: int = 1
) -> str:
    """The chart that `draw` makes on its axes, as inline SVG; `name` prefixes its ids, `height` is in inches.

    With more `panels`, one above the other, `draw` gets their axes, which share the horizontal one.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(panels, sharex=True)
        draw(axes)
        np.ravel(axes)[0].set_title(title, pad=10)
        figure.legend(loc="outside lower left", ncols=legend_columns, handlelength=1.8, columnspacing=1.2)
        return inline_svg(figure, name)


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that fills its column, with ids unique on the page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r'<metadata>.*?</metadata>|\sxmlns(:\w+)?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r'\1 class="chart" aria-hidden="true"', svg, count=1)
    svg = re.sub(r'\bid="|url\(#|href="#', rf"\g<0>{name}-", svg)
    return svg.replace(INK, "currentColor").strip()


def svg_file(inline: str) -> str:
    """An inline chart as a file of its own, which is dark where the reader's system is; empty if the chart is."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub("<svg([^>]*)>", rf"<svg {spaces}\1><style>{_SURFACE}</style>", inline, count=1)
