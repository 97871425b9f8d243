"""Content of the model card, collected from a run folder; `kmine.report.card` renders it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kmine import __version__
from kmine.config.sweep import MINING
from kmine.io.files import read_json
from kmine.mining.calibration.local_quality import local_quality_summary
from kmine.mining.calibration.step import calibration_summary
from kmine.ops.metrics import lesion_metrics, metrics_from_json
from kmine.ops.statistics import paired_difference
from kmine.predict.run_model import RunModel
from kmine.report.card import Card, Figures, render_card
from kmine.store.run_folder import RunFolder
from kmine.types import ROUND_0, SPLIT_NAMES

COPIED = ("name", "dataset", "class_names", "size", "window", "method", "segmenter", "round_idx", "checkpoint")
"""Fields of the card with the values of the metadata."""


def model_card(run_model: RunModel) -> str:
    """The card as Markdown; figures on the test split only if `kmine.compare` has opened it.

    It omits the run's command, which contains paths: cards are published.
    """
    run, cfg, metadata = run_model.run, run_model.cfg, run_model.metadata
    splits = RunFolder(run_model.root, follows=True).read_csv("splits.csv") or []
    counts = [(name, n) for name in SPLIT_NAMES if (n := sum(row["split"] == name for row in splits))]
    estimates = local_quality_summary(metadata.local_quality) if metadata.local_quality else metadata.no_estimate
    model = cfg.model.split()[0]
    weights = "weights of a file, for its encoder" if model.is_pretrained else "random weights"
    return render_card(
        Card(
            **{name: getattr(metadata, name) for name in COPIED},
            counts=counts,
            split_rule=_split_rule(run_model, splits),
            model=f"{model.name}, encoder {model.encoder}, from "
            + ("ImageNet weights" if model.encoder_weights == "hub" else weights),
            seed=cfg.seed,
            figures=list(_figures(run_model, {row["sample_id"]: row["group_id"] for row in splits})),
            guarantee=_guarantee(run_model.root).rstrip("."),
            estimates=_capitalised(estimates),
            signatures=_signatures(run, metadata.signature),
            versions=[("kmine", __version__), *((k, v) for k, v in run.get("versions", {}).items() if k != "kmine")],
        )
    )


def _split_rule(run_model: RunModel, splits: Sequence[Mapping[str, str]]) -> str:
    """How the split was made, and of how many training images the masks were used, counted in `splits`."""
    train = [row for row in splits if row["split"] in ("labeled", "unlabeled")]
    labeled = [row for row in train if row["split"] == "labeled"]
    part, whole = len(labeled), len(train)
    used = f"all {whole}" if part == whole else f"{part} of the {whole}"
    if run_model.cfg.data.fine_groups is not None:
        part, whole = (len({row["group_id"] for row in rows}) for rows in (labeled, train))
        used += f" training images ({part} of {whole} groups)"
    else:
        used += " training images"
    rule = "Split by group (patient, volume, near duplicates): no group is on two sides."
    if run_model.cfg.data.split_file is not None:
        rule = "The split was given; no group (patient, volume, near duplicates) is on two sides of it."
    return f"{rule} Masks were used of {used}." if train else rule


def _signatures(run: Mapping[str, Any], signature: str) -> list[tuple[str, str]]:
    keys = {"data": "data_fingerprint", "segmenter": "segmenter_sha256", "commit": "git_commit"}
    values = {"model": signature, **{name: run.get(key) for name, key in keys.items()}}
    return [(name, str(value)) for name, value in values.items() if value]


def _figures(run_model: RunModel, groups: Mapping[str, str]) -> Iterator[Figures]:
    which = "metrics" if run_model.metadata.checkpoint == "best" else "final_metrics"
    saved = read_json(run_model.weights.parent / "metrics.json") or {}
    if which in saved:
        yield _row("validation", saved[which], groups)
    methods = (read_json(run_model.root / "test_metrics.json") or {}).get("arms", {})
    if run_model.metadata.round_idx == run_model.run.get("adopted_round"):
        method = run_model.run.get("method", MINING)
    else:
        method = ROUND_0 if run_model.metadata.round_idx == 0 else ""
    tested = methods.get(method, {}).get("chosen" if run_model.metadata.checkpoint == "best" else "final")
    if tested:
        yield _row("test", tested, groups)


def _row(split: str, saved: Mapping[str, Any], groups: Mapping[str, str]) -> Figures:
    metrics = metrics_from_json(saved)
    dice = np.array([[case.dice for case in metrics.cases]], float)
    low = high = float("nan")
    if np.isfinite(dice).any():
        group_of_case = [groups.get(case.sample_id, case.sample_id) for case in metrics.cases]
        spread = paired_difference(np.zeros_like(dice), dice, seed=0, groups=group_of_case, num_flips=0)
        low, high = max(0.0, spread.low), min(1.0, spread.high)
    same = {name: getattr(metrics, name) for name in ("dice", "iou", "hd95", "num_missed", "num_empty")}
    return Figures(split, len(metrics.cases), low=low, high=high, **same, **asdict(lesion_metrics(metrics)))


def _guarantee(root: Path) -> str:
    saved = read_json(root / "calibration" / "calibration.json")
    return _capitalised(calibration_summary(saved)) if saved else "None: the run has no calibrated gate."


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
