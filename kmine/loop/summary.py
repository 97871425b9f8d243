"""Rows of results.csv and content of report.html, read from the run folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np

from kmine.mining import round_changes as changes
from kmine.mining.adaptation.step import adaptation_summary
from kmine.mining.calibration.step import calibration_summary, lacks_folds
from kmine.ops.calibrator import RiskGuarantee, describe_threshold
from kmine.ops.metrics import lesion_metrics, of_one_kind
from kmine.ops.statistics import SMALL_SPLIT, Paired, paired_change
from kmine.report.card import STAND_INS
from kmine.report.inputs import BY_MODEL, CSV_COLUMNS, Calibrated, Category, GalleryItem, Report, RoundRow
from kmine.store.history import read_history
from kmine.store.run_folder import RunFolder
from kmine.store.tables import DecisionRow, class_map
from kmine.training.rounds import kept_round
from kmine.training.task import Task
from kmine.types import EVIDENCE_COLUMNS, STOPPED_BY, Prompts, RoundResult, Skipped, labels_only_method

GALLERY_SIZE = 4
"""Images per category."""
OPTIONAL = ("witness_dice", "slice_dice")
"""Scores that a picture shows only where they are known."""


def segmenter_name(run: RunFolder) -> str:
    """Name of the segmenter that mines, adapted or not; `none` without mining."""
    return str(run.run().get("segmenter", "none"))


def round_rows(
    task: Task,
    mined: Sequence[RoundResult],
    baselines: Mapping[str, Sequence[RoundResult]] = MappingProxyType({}),
    by_model: Mapping[str, Sequence[RoundResult]] = MappingProxyType({}),
) -> list[RoundRow]:
    """One row a round, with the supervised baselines at equal steps, and those of other models.

    The last row has the baseline of one schedule.
    """
    baseline = {r.round_idx: r for r in baselines.get("supervised", ())}
    rows = [_row(r, baseline.get(r.round_idx), len(task.unlabeled), task.run) for r in mined]
    if once := [replace(r, round_idx=mined[-1].round_idx) for r in baselines.get("supervised_once", ())]:
        by_model = {"supervised_once": once, **by_model}
    figures = {name: {r.round_idx: _of_model(r) for r in rounds} for name, rounds in by_model.items()}
    kept = kept_round(mined).round_idx
    return [
        replace(
            row,
            kept=row.round_idx == kept,
            by_model={n: found[row.round_idx] for n, found in figures.items() if row.round_idx in found},
        )
        for row in rows
    ]


def _of_model(result: RoundResult) -> tuple[float, float, float]:
    """The figures `BY_MODEL` of a round of a baseline model."""
    found = lesion_metrics(result.metrics)
    return result.metrics.dice, found.dice_lesion, found.false_alarm_rate


def _changes(run: RunFolder, round_idx: int) -> changes.RoundChanges | None:
    """What a mining round changed; None for round 0."""
    value = run.read_json(run.round_dir(round_idx) / "changes.json") if round_idx else None
    return changes.RoundChanges.from_json(value) if value else None


def _row(result: RoundResult, baseline: RoundResult | None, num_unlabeled: int, run: RunFolder) -> RoundRow:
    round_changes = _changes(run, result.round_idx)
    other = lesion_metrics(baseline.metrics) if baseline else None
    same = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("metrics", "final_metrics")}
    return RoundRow(
        **same,
        **{name: getattr(result.metrics, name) for name in ("dice", "iou", "hd95", "num_missed", "num_empty")},
        **asdict(lesion_metrics(result.metrics)),
        dice_final=result.final_metrics.dice,
        supervised_dice=baseline.metrics.dice if baseline else None,
        supervised_dice_final=baseline.final_metrics.dice if baseline else None,
        supervised_adopted=baseline.adopted if baseline else None,
        supervised_dice_lesion=other.dice_lesion if other else None,
        supervised_false_alarm_rate=other.false_alarm_rate if other else None,
        coverage=result.num_pseudo / num_unlabeled if num_unlabeled and result.round_idx else float("nan"),
        correction=run.run().get("corrections", {}).get(run.round_signature(result.round_idx), "–"),
        reasons=dict(Counter(run.decisions(result.round_idx).column("reason"))),
        **(_change_columns(round_changes) if round_changes else {}),
    )


def _change_columns(round_changes: changes.RoundChanges) -> dict[str, Any]:
    counts = {f"num_{name}": len(getattr(round_changes, name)) for name in ("new", "readmitted", "removed")}
    shares = ("changed_pixels", "changed_label_pixels", "ignored_pixels")
    return counts | {name: getattr(round_changes, name) for name in shares}


def write_results(run: RunFolder, rows: Sequence[RoundRow]) -> None:
    """Write results.csv; NaN and None are empty cells."""
    segmenter = segmenter_name(run)
    separate = ("reasons", "seconds", "coverage", "round_idx", "by_model", "correction")
    plain = [f.name for f in fields(RoundRow) if f.name not in separate]
    stages = sorted({name for row in rows for name in row.seconds})
    named = [CSV_COLUMNS.get(name, name) for name in plain]
    models = sorted({name for row in rows for name in row.by_model})
    of_models = [f"{name}_{figure}" for name in models for figure in BY_MODEL]
    header = ["round", *named, "segmenter", *(f"seconds_{name}" for name in stages), *of_models]
    table = []
    for row in rows:
        values = [_csv_value(getattr(row, name)) for name in plain]
        seconds = [_csv_value(row.seconds.get(name)) for name in stages]
        others = [_csv_value(value) for name in models for value in row.by_model.get(name, [None] * len(BY_MODEL))]
        table.append([row.round_idx, *values, segmenter if row.round_idx else "", *seconds, *others])
    run.write_csv("results.csv", header, table)


def _csv_value(value: Any) -> Any:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value


def gain_over(task: Task, mined: Sequence[RoundResult], supervised: Sequence[RoundResult]) -> Paired | None:
    """`Report.gain`, by image, each of which counts on both sides; None with fewer than `SMALL_SPLIT` groups."""
    if not supervised:
        return None
    own, other = of_one_kind(*(kept_round(rounds).metrics for rounds in (mined, supervised)))
    groups = [task.val.group_of(case.sample_id) for case in own.cases]
    if len(set(groups)) < SMALL_SPLIT:
        return None
    of_other = {case.sample_id: case.score for case in other.cases}
    before = [of_other[case.sample_id] for case in own.cases]
    return paired_change(before, [case.score for case in own.cases], groups=groups, confidence=0.95)


def build_report(
    task: Task,
    rows: list[RoundRow],
    mined: Sequence[RoundResult],
    baselines: Mapping[str, Sequence[RoundResult]] = MappingProxyType({}),
    by_model: Mapping[str, Sequence[RoundResult]] = MappingProxyType({}),
) -> Report:
    """Content of report.html; figures come from the run folder, images from the unlabeled pool.

    Gains are over the first of the baselines, and over each of the baseline models.
    """
    gains = [_gain_note(name, gain_over(task, mined, rounds)) for name, rounds in by_model.items()]
    run, segmenter = task.run.run(), segmenter_name(task.run)
    models = [model for model in (task.cfg.model, task.auxiliary_model) if model]
    return Report(
        title=f"kmine run {task.run.root.name}",
        dataset=run["dataset"] + (f" ({task.cfg.data.kind})" if run["dataset"] == "phantom" else ""),
        model=" and, as auxiliary model, ".join(f"{model.name}, encoder {model.encoder}" for model in models),
        segmenter=segmenter,
        command=run["command"],
        rounds=rows,
        gallery=_gallery(task, max((r.round_idx for r in rows if not r.retrained), default=0)),
        provenance=_provenance(run),
        config_yaml=(task.run.root / "config.yaml").read_text("utf-8"),
        objects=", ".join(run.get("class_names", [])[1:]),
        warnings=_warnings(task, rows, segmenter),
        notes=[*_notes(task, rows), *gains],
        skipped=[Skipped(**s) for s in run.get("skipped", [])],
        validation_cases=len(task.val),
        calibration=_calibrated(task.run) if task.cfg.rounds else None,
        gain=gain_over(task, mined, next(iter(baselines.values()), ())),
        baselines={name: kept_round(rounds).metrics.dice for name, rounds in baselines.items()},
        history=read_history(task.run),
    )


def _gain_note(name: str, gain: Paired | None) -> str:
    """A sentence on the difference to a baseline model."""
    method = labels_only_method(name)
    if gain is None:
        return f"{method}, the same labels and steps: too few validation images for an interval of the difference."
    interval = f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"Dice, image by image, minus that of {method} with the same labels and steps: {interval} on validation."


def _calibrated(run: RunFolder) -> Calibrated | None:
    record = run.read_json(run.root / "calibration" / "calibration.json")
    if not record or not record["promise"]:
        return None
    curves = ([tuple(row) for row in record[name]] for name in ("risk_coverage", "reliability"))
    return Calibrated(*curves, coverage=record["promise"]["coverage"], target=record["target"])


def _provenance(run: dict[str, Any]) -> dict[str, str]:
    versions = {f"version of {name}": version for name, version in run.get("versions", {}).items()}
    shown = {
        name: value for name, value in run.items() if name not in ("skipped", "command", "versions", "corrections")
    }
    return {name: str(value) for name, value in (shown | versions).items()}


def _warnings(task: Task, rows: Sequence[RoundRow], segmenter: str) -> list[tuple[str, str]]:
    """What limits the figures, with its cure, the weightiest first: images, masks, segmenter, gate, files."""
    run, plain, found = task.run.run(), re.split(r"[:+]", segmenter)[0], []
    if len(task.val) < SMALL_SPLIT:
        cure = "a larger --data.val_fraction, or --data.folds 5, with another --out"
        found.append((f"Validation holds only {len(task.val)} images: differences of a few points are noise", cure))
    for n, changed in _changes_by_round(task.run, rows).items():
        problems = changes.warnings(changed, run.get("class_names", ()))
        found += [(f"Round {n}: {problem}", cure) for problem, cure in problems]
    if task.cfg.rounds and (stand_in := STAND_INS.get(plain)):
        what = f"The segmenter: {stand_in} (these are not SAM's figures)"
        found.append((what, "--segmenter.name sam_vit_b with another --out mines with SAM"))
    if (record := _calibration(task)) and not (record["promise"] and RiskGuarantee.from_json(record["promise"]).holds):
        cure = "label more images: kmine next names them"
        if lacks_folds(record):
            cure = "--adapt.folds 5 with another --out, and labels of more than one group"
        found.append((f"The gate: {calibration_summary(record)}", cure))
    if skipped := len(run.get("skipped", [])):
        found.append((f"{skipped} files were left out", "mend those under Skipped files, and run again"))
    return found


def _calibration(task: Task) -> dict[str, Any] | None:
    return task.run.read_json(task.run.root / "calibration" / "calibration.json") if task.cfg.rounds else None


def _notes(task: Task, rows: Sequence[RoundRow]) -> list[str]:
    """What happened, in sentences."""
    run, notes = task.run, []
    if task.cfg.rounds and (record := run.read_json(run.root / "segmenter" / "adaptation.json")):
        notes.append(f"The segmenter: {adaptation_summary(record)}.")
    if (record := _calibration(task)) and record["promise"] and RiskGuarantee.from_json(record["promise"]).holds:
        notes.append(f"The gate: {calibration_summary(record)}.")
    interval = f"that is the lower end of the 80 % interval, and up to {task.cfg.adopt_tolerance} is tolerated"
    mean = f"with fewer than {SMALL_SPLIT} independent images the mean decides, and no fall is tolerated"
    records = {row.round_idx: run.read_json(run.round_dir(row.round_idx) / "threshold.json") for row in rows}
    notes += [f"Round {n}: {describe_threshold(record)}." for n, record in records.items() if record]
    notes += [
        f"Round {r.round_idx} was {r.reason} in validation Dice, image by image, against the last adopted round; "
        f"{interval if 'may' in r.reason else mean}. The next round started from the last adopted one."
        for r in rows
        if not r.adopted and r.num_pseudo and not r.retrained
    ]
    notes += [
        f"Round {r.round_idx} is a new model, trained once on labels and last pseudo masks with all rounds' steps."
        for r in rows
        if r.retrained
    ]
    if kept := [r.round_idx for r in rows if r.kept and len(rows) > 1]:
        notes.append(f"The run keeps the model of round {kept[0]}, of those adopted the best on validation.")
    if by_round := _changes_by_round(run, rows):
        last, names = max(by_round), run.run().get("class_names", ())
        notes.append(f"Round {last}: {changes.summary_line(by_round[last], names)}.")
    reason = STOPPED_BY.get(run.run().get("stopped_by", ""))
    if reason and rows and task.cfg.rounds:
        last = [r.round_idx for r in rows if not r.retrained][-1]
        notes.append(f"The loop stopped after round {last} of {task.cfg.rounds}: {reason}.")
    return notes


def _changes_by_round(run: RunFolder, rows: Sequence[RoundRow]) -> dict[int, changes.RoundChanges]:
    return {row.round_idx: round_changes for row in rows if (round_changes := _changes(run, row.round_idx))}


def _gallery(task: Task, round_idx: int) -> list[GalleryItem]:
    """Best and worst kept images and dropped ones of a round, by the gate's scores; no true mask is read."""
    decisions, prompts = task.run.by_sample(round_idx)
    scores: dict[bool, dict[str, float]] = {True: {}, False: {}}  # by whether the image is in training
    objects = (row for row in task.run.decisions(round_idx) if row.is_object)
    for sample_id, group in groupby(objects, key=lambda row: row.sample_id):
        rows = list(group)
        scores[rows[0].in_training][sample_id] = _score(rows)
    kept, dropped = sorted(scores[True], key=lambda i: -scores[True][i]), sorted(scores[False], key=scores[False].get)
    best, worst = kept[:GALLERY_SIZE], kept[GALLERY_SIZE:][-GALLERY_SIZE:]
    return [
        _item(task, round_idx, category, decisions[sample_id], [row.to_prompts() for row in prompts[sample_id]])
        for category, ids in (("best", best), ("worst", worst), ("dropped", dropped[:GALLERY_SIZE]))
        for sample_id in ids
    ]


def _score(rows: Sequence[DecisionRow]) -> float:
    """How well an image's objects are supported: the lowest of its objects' mean of the scores that are in [0, 1]."""
    names = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "confidence_inside")
    finite = [[score for n in names if not np.isnan(score := getattr(row.evidence, n))] for row in rows]
    return min((float(np.mean(values)) if values else 0.0) for values in finite)


def _item(
    task: Task, round_idx: int, category: Category, rows: Sequence[DecisionRow], prompts: list[Prompts]
) -> GalleryItem:
    sample = task.unlabeled.sample(rows[0].sample_id)
    local, segmenter_mask = (class_map(rows, sample.image.shape[:2], source) for source in ("local", "segmenter"))
    first = next((row for row in rows if not row.kept), rows[0])
    scores = dict(zip(EVIDENCE_COLUMNS, astuple(first.evidence), strict=True))
    return GalleryItem(
        category=category,
        sample_id=sample.sample_id,
        round_idx=round_idx,
        reason=first.reason,
        scores={name: x for name, x in scores.items() if name not in OPTIONAL or not np.isnan(x)},
        image=sample.image,
        prompts=prompts,
        local_mask=local,
        segmenter_mask=segmenter_mask,
        pseudo_mask=task.pseudo_mask(round_idx, sample.sample_id) if rows[0].in_training else None,
    )
