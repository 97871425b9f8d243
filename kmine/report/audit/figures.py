"""Charts of an audit as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kmine.report.figures import MINING, REASON_COLOURS, SUPERVISED, reliability_svg, svg_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]
"""(share kept, mean true Dice of the kept masks), in the order of trust."""


def true_coverage_chart(by: Mapping[str, Curve]) -> str:
    """Mean true Dice of the kept masks against their share, by the score that orders them."""

    def draw(axes: Axes) -> None:
        for (name, curve), colour in zip(by.items(), (MINING, SUPERVISED, *REASON_COLOURS), strict=False):
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
    bars = [(f"{name} ({count})", mean) for name, mean, count in strata]
    title = "Withheld masks: quality by kind of image"
    return _bars("audit-strata", title, bars, MINING, "mean true Dice", xlabel="true Dice", xlim=(0, 1))


def explanations_chart(counts: Sequence[tuple[str, int]]) -> str:
    """How often each signal explains one of the most suspicious masks: (name, count)."""
    title = "Reasons for suspicion among the most suspicious masks"
    return _bars("audit-causes", title, counts, SUPERVISED, "masks", xlabel="masks in the most suspicious fifth")


def _bars(
    name: str, title: str, bars: Sequence[tuple[str, float]], colour: str, label: str, **axes_settings: Any
) -> str:
    """Horizontal bars (name, value), the first on top."""

    def draw(axes: Axes) -> None:
        axes.barh([text for text, _ in bars], [value for _, value in bars], color=colour, height=0.62, label=label)
        axes.invert_yaxis()
        axes.set(**axes_settings)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    return svg_chart(name, title, draw, height=1.6 + 0.36 * len(bars))
