"""What the model card says, gathered from a run folder; `kmine.report.card` writes it down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kmine import __version__
from kmine.config.sweep import MINING
from kmine.mining.calibration import local_quality as alone
from kmine.ops.metrics import summarise
from kmine.ops.statistics import paired_difference
from kmine.predict.run_model import RunModel
from kmine.report.card import Card, Figures, render_card
from kmine.types import ROUND_0, SPLIT_NAMES, CaseMetrics, Metrics

NAN = float("nan")


def model_card(run_model: RunModel) -> str:
    """Markdown. Test figures only where `kmine.compare` has opened the test split.

    The run's command is not in it: it holds paths, and cards are passed on.
    """
    run, cfg, metadata = run_model.run, run_model.cfg, run_model.metadata
    splits = _splits(run_model.root)
    counts = [(name, n) for name in SPLIT_NAMES if (n := sum(split == name for _, split in splits.values()))]
    model = cfg.model.split()[0]
    weights_source = {None: "random weights", "none": "random weights", "hub": "ImageNet weights"}
    return render_card(
        Card(
            name=metadata.name,
            dataset=metadata.dataset,
            class_names=metadata.class_names,
            counts=counts,
            split_rule=_split_rule(run_model),
            size=metadata.size,
            window=metadata.window,
            method=metadata.method,
            model=f"{model.name}, encoder {model.encoder}, from "
            + weights_source.get(model.encoder_weights, "weights of a file, for its encoder"),
            segmenter=metadata.segmenter,
            round_idx=metadata.round_idx,
            checkpoint=metadata.checkpoint,
            seed=cfg.seed,
            figures=list(_figures(run_model, {name: group for name, (group, _) in splits.items()})),
            guarantee=_guarantee(run_model.root).rstrip("."),
            estimates=_capitalised(
                alone.local_quality_summary(metadata.alone) if metadata.alone else metadata.no_estimate
            ),
            signatures=_signatures(run, metadata.signature),
            versions=[("kmine", __version__), *((k, v) for k, v in run.get("versions", {}).items() if k != "kmine")],
        )
    )


def _split_rule(run_model: RunModel) -> str:
    data = run_model.cfg.data
    if data.split_file is not None:
        return "The split was given; no group (patient, volume, near duplicates) is on two sides of it."
    used = f"{data.label_fraction:g} of the training images"
    if data.fine_groups is not None:
        used = f"{data.fine_groups:g} of the training groups"
    return f"Split by group (patient, volume, near duplicates): no group is on two sides. Masks were used of {used}."


def _signatures(run: Mapping[str, Any], signature: str) -> list[tuple[str, str]]:
    values = [
        ("model", signature),
        ("data", run.get("data_fingerprint")),
        ("segmenter", run.get("segmenter_sha256")),
        ("commit", run.get("git_commit")),
    ]
    return [(name, str(value)) for name, value in values if value]


def _figures(run_model: RunModel, groups: Mapping[str, str]) -> Iterator[Figures]:
    which = "metrics" if run_model.metadata.checkpoint == "best" else "final_metrics"
    saved = _read(run_model.weights.parent / "metrics.json")
    if which in saved:
        yield _row("validation", saved[which], groups)
    methods = _read(run_model.root / "test_metrics.json").get("arms", {})
    if run_model.metadata.round_idx == run_model.run.get("adopted_round"):
        method = run_model.run.get("method", MINING)
    else:
        method = ROUND_0 if run_model.metadata.round_idx == 0 else ""
    tested = methods.get(method, {}).get("chosen" if run_model.metadata.checkpoint == "best" else "final")
    if tested:
        yield _row("test", tested, groups)


def _row(split: str, saved: Mapping[str, Any], groups: Mapping[str, str]) -> Figures:
    cases = [CaseMetrics(**{k: NAN if v is None else v for k, v in case.items()}) for case in saved["cases"]]
    metrics: Metrics = summarise(cases)
    dice = np.array([[case.dice for case in cases]], float)
    low = high = NAN
    if np.isfinite(dice).any():
        of_each = [groups.get(case.sample_id, case.sample_id) for case in cases]
        spread = paired_difference(np.zeros_like(dice), dice, seed=0, groups=of_each, num_flips=0)
        low, high = max(0.0, spread.low), min(1.0, spread.high)
    return Figures(split, len(cases), metrics.dice, low, high, metrics.iou, metrics.hd95, metrics.num_missed)


def _guarantee(root: Path) -> str:
    saved = _read(root / "calibration" / "calibration.json")
    if not saved:
        return "Nothing: the run has no calibrated gate."
    from kmine.mining.calibration.step import calibration_summary

    return _capitalised(calibration_summary(saved))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _splits(root: Path) -> dict[str, tuple[str, str]]:
    """Sample id -> group, split."""
    import csv

    path = root / "splits.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["sample_id"]: (row["group_id"], row["split"]) for row in csv.DictReader(file)}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
