"""Charts of an audit as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kmine.report.figures import MINING, SUPERVISED, reliability_svg, svg_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]
"""(share kept, mean true Dice of the kept masks), in the order of trust."""


def true_coverage_chart(by: Mapping[str, Curve]) -> str:
    """Mean true Dice of the kept masks against their share, by the score that orders them."""

    def draw(axes: Axes) -> None:
        for (name, curve), colour in zip(by.items(), (MINING, SUPERVISED, "#2f9e6e", "#8b5fbf"), strict=False):
            shares, means = zip(*curve, strict=True)
            axes.plot(shares, means, "-", color=colour, label=f"kept by {name}")
        axes.set(xlabel="share of the pseudo masks kept", ylabel="true Dice", xlim=(0, 1.02))
        axes.grid(axis="y")

    return svg_chart("audit-coverage", "Withheld masks: quality against coverage", draw, height=3.6)


def true_reliability_chart(bins: Sequence[tuple[float, float, int]]) -> str:
    """True against estimated Dice of the pseudo masks: (mean estimate, mean Dice, count) of bins."""
    return reliability_svg("audit-reliability", "Withheld masks: estimated and true Dice", bins, "masks")


def strata_chart(strata: Sequence[tuple[str, float, int]]) -> str:
    """Mean true Dice by stratum: (name, mean, count)."""

    def draw(axes: Axes) -> None:
        bars = {f"{name} ({count})": mean for name, mean, count in strata}
        axes.barh([*bars], [*bars.values()], color=MINING, height=0.62, label="mean true Dice")
        axes.invert_yaxis()
        axes.set(xlabel="true Dice", xlim=(0, 1))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    return svg_chart("audit-strata", "Withheld masks: quality by kind of image", draw, height=1.6 + 0.36 * len(strata))
