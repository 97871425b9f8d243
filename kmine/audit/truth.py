"""What the pseudo masks are really worth, where withheld masks exist and the audit was asked to open them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import MaskReport, MinedRound
from kmine.data.pool import Pool
from kmine.mining.calibration.fit import reliability, risk_coverage
from kmine.ops.metrics import case_metrics
from kmine.report.audit import figures as audit_figures

StratumRow = dict[str, Any]
MAX_GROUPS = 12
"""Groups in the chart; of more, the worst are shown."""


def withheld_dice(
    reports: Iterable[MaskReport], read: Callable[[str], NDArray[np.uint8]], withheld: Pool, num_classes: int
) -> dict[str, float]:
    """By sample, Dice of a pseudo mask with the withheld one: mean over the classes that either has.

    Pixels that the pseudo mask leaves open do not count; empty on both sides, there is no number, as everywhere.
    """
    withheld_ids, out = set(withheld.ids), {}
    for report in reports:
        if report.sample_id not in withheld_ids:
            continue
        truth, mask = withheld.sample(report.sample_id).mask, read(report.sample_id)
        assert truth is not None, "opened with masks"
        # The metric leaves out what the truth leaves open: what the mask leaves open joins it.
        target = np.where(mask == 255, np.uint8(255), truth)
        case = case_metrics(
            report.sample_id, np.where(mask == 255, np.uint8(0), mask), target, num_classes, with_hd95=False
        )
        out[report.sample_id] = case.dice
    return out


def mean_estimate(mined_round: MinedRound, sample_id: str) -> float:
    """Mean estimated Dice of the kept objects of an image; NaN without any."""
    values = [
        row["estimated_dice"] for row in mined_round.decisions[sample_id] if row["kept"] and row["object_idx"] >= 0
    ]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def figures(
    reports: Sequence[MaskReport],
    dice: Mapping[str, float],
    mined_round: MinedRound,
    groups: Mapping[str, str],
    class_names: Sequence[str],
) -> tuple[dict[str, str], list[StratumRow]]:
    """SVGs by name for the page, and the table of strata: stratum, value, count, mean Dice."""
    scored = [report for report in reports if not math.isnan(dice.get(report.sample_id, math.nan))]
    if not scored:
        return {}, []
    truth = np.array([dice[report.sample_id] for report in scored])
    estimates = np.array([mean_estimate(mined_round, report.sample_id) for report in scored])
    curves = {"the audit's suspicion": risk_coverage(np.array([-report.suspicion for report in scored]), truth)}
    charts: dict[str, str] = {}
    has_estimate = ~np.isnan(estimates)
    if has_estimate.any():
        curves["estimated Dice"] = risk_coverage(estimates[has_estimate], truth[has_estimate])
        charts["reliability"] = audit_figures.true_reliability_chart(
            reliability(estimates[has_estimate], truth[has_estimate])
        )
    charts["coverage"] = audit_figures.true_coverage_chart(curves)
    table = strata(scored, truth, groups, class_names)
    shown = [row for row in table if row["stratum"] != "group"]
    shown += sorted((row for row in table if row["stratum"] == "group"), key=lambda row: row["mean_dice"])[:MAX_GROUPS]
    bars = [(f"{row['stratum']} {row['value']}", row["mean_dice"], row["count"]) for row in shown]
    charts["strata"] = audit_figures.strata_chart(bars)
    return charts, table


def strata(
    reports: Sequence[MaskReport], truth: NDArray[np.float64], groups: Mapping[str, str], class_names: Sequence[str]
) -> list[StratumRow]:
    """Mean true Dice by size of what the mask shows (thirds), by class, and by groups of several images."""
    sizes = np.array([report.area for report in reports])
    out: list[StratumRow] = []
    names = ("small", "medium", "large")
    order = np.argsort(sizes, kind="stable")
    for name, indices in zip(names, np.array_split(order, 3), strict=True):
        out += _stratum_row("size", name, truth[indices])
    for class_id, name in enumerate(class_names):
        shows = np.array([class_id in report.classes for report in reports])
        out += _stratum_row("class", name, truth[shows]) if class_id else []
    of_group: dict[str, list[float]] = {}
    for report, value in zip(reports, truth, strict=True):
        of_group.setdefault(groups[report.sample_id], []).append(float(value))
    if any(len(values) > 1 for values in of_group.values()):
        for name, values in sorted(of_group.items()):
            out += _stratum_row("group", name, np.array(values)) if len(values) > 1 else []
    return out


def _stratum_row(stratum: str, value: str, dice: NDArray[np.float64]) -> list[StratumRow]:
    if not len(dice):
        return []
    return [{"stratum": stratum, "value": value, "count": len(dice), "mean_dice": round(float(dice.mean()), 4)}]
