"""Charts of an audit as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kmine.report.figures import (
    _INK,
    _REASON_COLOURS,
    MINING,
    SUPERVISED,
    _svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]
"""(share kept, mean true Dice of the kept masks), in the order of trust."""


def true_coverage_chart(by: Mapping[str, Curve]) -> str:
    """Mean true Dice of the kept masks against their share, by the score that orders them."""

    def draw(axes: Axes) -> None:
        for (name, curve), colour in zip(by.items(), (MINING, SUPERVISED, *_REASON_COLOURS), strict=False):
            shares, means = zip(*curve, strict=True)
            axes.plot(shares, means, "-", color=colour, label=f"kept by {name}")
        axes.set(xlabel="share of the pseudo masks kept", ylabel="true Dice", xlim=(0, 1.02))
        axes.grid(axis="y")

    return _svg("audit-coverage", "Withheld masks: quality against coverage", draw, height=3.6)


def true_reliability_chart(bins: Sequence[tuple[float, float, int]]) -> str:
    """True against estimated Dice of the pseudo masks: (mean estimate, mean Dice, count) of bins."""

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), ":", color=_INK, label="perfect calibration")
        estimates, means, counts = zip(*bins, strict=True)
        axes.plot(estimates, means, "o-", color=MINING, label=f"bins of {min(counts)} to {max(counts)} masks")
        axes.set(xlabel="estimated Dice", ylabel="true Dice", xlim=(0, 1), ylim=(0, 1))
        axes.grid()

    return _svg("audit-reliability", "Withheld masks: estimated and true Dice", draw, height=3.6)


def strata_chart(strata: Sequence[tuple[str, float, int]]) -> str:
    """Mean true Dice by stratum: (name, mean, count)."""

    def draw(axes: Axes) -> None:
        names = [f"{name} ({count})" for name, _, count in strata]
        axes.barh(names, [mean for _, mean, _ in strata], color=MINING, height=0.62, label="mean true Dice")
        axes.invert_yaxis()
        axes.set(xlabel="true Dice", xlim=(0, 1))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    return _svg("audit-strata", "Withheld masks: quality by kind of image", draw, height=1.6 + 0.36 * len(strata))


def explanations_chart(counts: Sequence[tuple[str, int]]) -> str:
    """How often each signal explains one of the most suspicious masks: (name, count)."""

    def draw(axes: Axes) -> None:
        axes.barh([name for name, _ in counts], [n for _, n in counts], color=SUPERVISED, height=0.62, label="masks")
        axes.invert_yaxis()
        axes.set_xlabel("masks in the most suspicious fifth")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    return _svg(
        "audit-causes", "Reasons for suspicion among the most suspicious masks", draw, height=1.6 + 0.36 * len(counts)
    )
