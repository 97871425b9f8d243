"""What the model card says, gathered from a run folder; `kmine.report.card` writes it down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kmine import __version__
from kmine.compare.table import MINING, ROUND_0
from kmine.mining.calibration import local_quality as alone
from kmine.ops.metrics import summarise
from kmine.ops.statistics import paired_difference
from kmine.predict.run_model import RunModel
from kmine.report.card import Card, Figures, render_card
from kmine.types import SPLIT_NAMES, CaseMetrics, Metrics

NAN = float("nan")


def model_card(found: RunModel) -> str:
    """Markdown. Test figures only where `kmine.compare` has opened the test split.

    The run's command is not in it: it holds paths, and cards are passed on.
    """
    run, cfg, about = found.run, found.cfg, found.about
    splits = _splits(found.root)
    counts = [(name, n) for name in SPLIT_NAMES if (n := sum(split == name for _, split in splits.values()))]
    model = cfg.model.split()[0]
    start = {None: "random weights", "none": "random weights", "hub": "ImageNet weights"}
    return render_card(
        Card(
            name=about.name,
            dataset=about.dataset,
            class_names=about.class_names,
            counts=counts,
            split_rule=_split_rule(found),
            size=about.size,
            window=about.window,
            method=about.method,
            model=f"{model.name}, encoder {model.encoder}, from "
            + start.get(model.encoder_weights, "weights of a file, for its encoder"),
            segmenter=about.segmenter,
            round_idx=about.round_idx,
            checkpoint=about.checkpoint,
            seed=cfg.seed,
            figures=list(_figures(found, {name: group for name, (group, _) in splits.items()})),
            promise=_promise(found.root).rstrip("."),
            estimates=_said(alone.sentence(about.alone) if about.alone else about.no_estimate),
            signatures=_signatures(run, about.signature),
            versions=[("kmine", __version__), *((k, v) for k, v in run.get("versions", {}).items() if k != "kmine")],
        )
    )


def _split_rule(found: RunModel) -> str:
    data = found.cfg.data
    if data.split_file is not None:
        return "The split was given; no group (patient, volume, near duplicates) is on two sides of it."
    used = f"{data.label_fraction:g} of the training images"
    if data.fine_groups is not None:
        used = f"{data.fine_groups:g} of the training groups"
    return f"Split by group (patient, volume, near duplicates): no group is on two sides. Masks were used of {used}."


def _signatures(run: Mapping[str, Any], signature: str) -> list[tuple[str, str]]:
    told = [
        ("model", signature),
        ("data", run.get("data_fingerprint")),
        ("segmenter", run.get("segmenter_sha256")),
        ("commit", run.get("git_commit")),
    ]
    return [(name, str(value)) for name, value in told if value]


def _figures(found: RunModel, groups: Mapping[str, str]) -> Iterator[Figures]:
    which = "metrics" if found.about.checkpoint == "best" else "final_metrics"
    saved = _read(found.weights.parent / "metrics.json")
    if which in saved:
        yield _row("validation", saved[which], groups)
    arms = _read(found.root / "test_metrics.json").get("arms", {})
    if found.about.round_idx == found.run.get("adopted_round"):
        arm = found.run.get("method", MINING)
    else:
        arm = ROUND_0 if found.about.round_idx == 0 else ""
    tested = arms.get(arm, {}).get("chosen" if found.about.checkpoint == "best" else "final")
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


def _promise(root: Path) -> str:
    saved = _read(root / "calibration" / "calibration.json")
    if not saved:
        return "Nothing: the run has no calibrated gate."
    from kmine.mining.calibration.step import sentence

    return _said(sentence(saved))


def _said(text: str) -> str:
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
