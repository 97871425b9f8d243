"""True quality of the pseudo masks, from withheld masks that the audit opened on request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit.reports import MaskReport
from kmine.audit.rounds import AuditedRun, read_mask_of
from kmine.data.pool import Pool
from kmine.mining.calibration.fit import reliability, risk_coverage
from kmine.ops.metrics import Correction, case_metrics, correction
from kmine.report.audit.figures import strata_chart, true_coverage_chart, true_reliability_chart
from kmine.store.tables import class_map
from kmine.types import IGNORE_INDEX

MAX_GROUPS = 12
"""Groups in the chart, worst first."""


class Stratum(NamedTuple):
    """Mean true Dice of one kind of image; fields are columns of strata.csv."""

    stratum: str
    value: str
    count: int
    mean_dice: float


def withheld_dice(audited: AuditedRun, reports: Iterable[MaskReport], withheld: Pool) -> dict[str, float]:
    """Dice of pseudo masks with withheld masks by sample id: mean over the classes that either has.

    Pixels ignored by the pseudo mask are not counted. NaN if both are empty.
    """
    read, withheld_ids, out = audited.read("pseudo"), set(withheld.ids), {}
    for report in reports:
        if report.sample_id not in withheld_ids:
            continue
        truth, mask = read_mask_of(withheld, report.sample_id), read(report.sample_id)
        # The metric leaves out pixels that the truth ignores: add those of the pseudo mask.
        target = np.where(mask == IGNORE_INDEX, np.uint8(IGNORE_INDEX), truth)
        predicted = np.where(mask == IGNORE_INDEX, np.uint8(0), mask)
        case = case_metrics(report.sample_id, predicted, target, audited.task.num_classes, with_hd95=False)
        out[report.sample_id] = case.dice
    return out


def corrections(audited: AuditedRun, withheld: Pool) -> dict[int, Correction]:
    """By round, what its pseudo masks change in the local model's own, over images with objects and a withheld mask.

    The local model's mask is that of its objects: specks too small for a prompt count as background.
    """
    task, withheld_ids, found = audited.task, set(withheld.ids), {}
    for mined in audited.rounds:
        parts = []
        for sample_id in withheld_ids.intersection(mined.pseudo_labeled):
            if objects := mined.objects(sample_id):
                truth = read_mask_of(withheld, sample_id)
                local = class_map(objects, truth.shape, "local")
                parts.append(correction(local, task.pseudo_mask(mined.round_idx, sample_id), truth))
        found[mined.round_idx] = Correction.total(parts)
    return found


def figures(
    audited: AuditedRun, reports: Sequence[MaskReport], dice: Mapping[str, float]
) -> tuple[dict[str, str], list[Stratum]]:
    """Charts of the page (SVG by caption) and the rows of strata.csv; empty without a known Dice."""
    scored = [report for report in reports if not math.isnan(dice.get(report.sample_id, math.nan))]
    if not scored:
        return {}, []
    truth = np.array([dice[report.sample_id] for report in scored])
    estimates = np.array([audited.audited_round.mean_estimate(report.sample_id) for report in scored])
    curves = {"the audit's suspicion": risk_coverage(np.array([-report.suspicion for report in scored]), truth)}
    charts: dict[str, str] = {}
    known = ~np.isnan(estimates)
    if known.any():
        curves["estimated Dice"] = risk_coverage(estimates[known], truth[known])
        charts["reliability"] = true_reliability_chart(reliability(estimates[known], truth[known]))
    charts["coverage"] = true_coverage_chart(curves)
    groups = {report.sample_id: audited.task.unlabeled.group_of(report.sample_id) for report in scored}
    table = strata(scored, truth, groups, audited.source.class_names)
    worst_groups = sorted((row for row in table if row.stratum == "group"), key=lambda row: row.mean_dice)
    shown = [*(row for row in table if row.stratum != "group"), *worst_groups[:MAX_GROUPS]]
    charts["strata"] = strata_chart([(f"{row.stratum} {row.value}", row.mean_dice, row.count) for row in shown])
    return charts, table


def strata(
    reports: Sequence[MaskReport], truth: NDArray[np.float64], groups: Mapping[str, str], class_names: Sequence[str]
) -> list[Stratum]:
    """Mean true Dice by size of the mask's foreground (thirds), by class, and by group of several images."""
    found = _strata(reports, truth, groups, class_names)
    return [Stratum(kind, value, len(dice), round(float(np.mean(dice)), 4)) for kind, value, dice in found if len(dice)]


def _strata(
    reports: Sequence[MaskReport], truth: NDArray[np.float64], groups: Mapping[str, str], class_names: Sequence[str]
) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    order = np.argsort(np.array([report.area for report in reports]), kind="stable")
    for name, indices in zip(("small", "medium", "large"), np.array_split(order, 3), strict=True):
        yield "size", name, truth[indices]
    for class_id, name in list(enumerate(class_names))[1:]:
        yield "class", name, truth[np.array([class_id in report.classes for report in reports])]
    of_group: dict[str, list[float]] = {}
    for report, value in zip(reports, truth, strict=True):
        of_group.setdefault(groups[report.sample_id], []).append(float(value))
    for name, values in sorted(of_group.items()):
        if len(values) > 1:
            yield "group", name, np.array(values)
