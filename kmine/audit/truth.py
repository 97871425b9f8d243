"""What the pseudo masks are really worth, where withheld masks exist and the audit was asked to open them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import Found, Past
from kmine.data.pool import Pool
from kmine.mining.calibration.fit import reliability, risk_coverage
from kmine.ops.metrics import case_metrics
from kmine.report import audit_figures

Cells = dict[str, Any]
MAX_GROUPS = 12
"""Groups in the chart; of more, the worst are shown."""


def true_dice(
    found: Iterable[Found], read: Callable[[str], NDArray[np.uint8]], withheld: Pool, num_classes: int
) -> dict[str, float]:
    """By sample, Dice of a pseudo mask with the withheld one: mean over the classes that either has.

    Pixels that the pseudo mask leaves open do not count; empty on both sides, there is no number, as everywhere.
    """
    known, out = set(withheld.ids), {}
    for one in found:
        if one.sample_id not in known:
            continue
        truth, mask = withheld.sample(one.sample_id).mask, read(one.sample_id)
        assert truth is not None, "opened with masks"
        # The metric leaves out what the truth leaves open: what the mask leaves open joins it.
        asked = np.where(mask == 255, np.uint8(255), truth)
        case = case_metrics(
            one.sample_id, np.where(mask == 255, np.uint8(0), mask), asked, num_classes, with_hd95=False
        )
        out[one.sample_id] = case.dice
    return out


def estimate_of(past: Past, sample_id: str) -> float:
    """Mean estimated Dice of the kept objects of an image; NaN without any."""
    values = [row["estimated_dice"] for row in past.decisions[sample_id] if row["kept"] and row["object_idx"] >= 0]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def figures(
    found: Sequence[Found], dice: Mapping[str, float], past: Past, groups: Mapping[str, str], class_names: Sequence[str]
) -> tuple[dict[str, str], list[Cells]]:
    """SVGs by name for the page, and the table of strata: stratum, value, count, mean Dice."""
    known = [one for one in found if not math.isnan(dice.get(one.sample_id, math.nan))]
    if not known:
        return {}, []
    truth = np.array([dice[one.sample_id] for one in known])
    estimates = np.array([estimate_of(past, one.sample_id) for one in known])
    curves = {"the audit's suspicion": risk_coverage(np.array([-one.suspicion for one in known]), truth)}
    charts: dict[str, str] = {}
    told = ~np.isnan(estimates)
    if told.any():
        curves["estimated Dice"] = risk_coverage(estimates[told], truth[told])
        charts["reliability"] = audit_figures.true_reliability_chart(reliability(estimates[told], truth[told]))
    charts["coverage"] = audit_figures.true_coverage_chart(curves)
    table = strata(known, truth, groups, class_names)
    shown = [row for row in table if row["stratum"] != "group"]
    shown += sorted((row for row in table if row["stratum"] == "group"), key=lambda row: row["mean_dice"])[:MAX_GROUPS]
    bars = [(f"{row['stratum']} {row['value']}", row["mean_dice"], row["count"]) for row in shown]
    charts["strata"] = audit_figures.strata_chart(bars)
    return charts, table


def strata(
    found: Sequence[Found], truth: NDArray[np.float64], groups: Mapping[str, str], class_names: Sequence[str]
) -> list[Cells]:
    """Mean true Dice by size of what the mask shows (thirds), by class, and by groups of several images."""
    sizes = np.array([one.area for one in found])
    out: list[Cells] = []
    names = ("small", "medium", "large")
    order = np.argsort(sizes, kind="stable")
    for name, part in zip(names, np.array_split(order, 3), strict=True):
        out += _cell("size", name, truth[part])
    for class_id, name in enumerate(class_names):
        shows = np.array([class_id in one.classes for one in found])
        out += _cell("class", name, truth[shows]) if class_id else []
    of_group: dict[str, list[float]] = {}
    for one, value in zip(found, truth, strict=True):
        of_group.setdefault(groups[one.sample_id], []).append(float(value))
    if any(len(values) > 1 for values in of_group.values()):
        for name, values in sorted(of_group.items()):
            out += _cell("group", name, np.array(values)) if len(values) > 1 else []
    return out


def _cell(stratum: str, value: str, dice: NDArray[np.float64]) -> list[Cells]:
    if not len(dice):
        return []
    return [{"stratum": stratum, "value": value, "count": len(dice), "mean_dice": round(float(dice.mean()), 4)}]
