"""The gate's threshold of a round, and the signature of what a round is mined with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any, cast

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import threshold_for_mean_estimate
from kmine.mining.candidates import (
    gate_batch,
    generate_prompts,
    predict_auxiliary,
    predict_probs,
    read_batch,
    segment_prompts,
    sign_areas,
)
from kmine.mining.context import RoundContext
from kmine.mining.rank import LIMIT, PRIOR, Ranking, fit_ranking
from kmine.ops.calibrator import LATER, Calibration, describe_threshold
from kmine.ops.seeding import derive_seed
from kmine.segmenters.base import MemorySegmenter
from kmine.store.settings import signed_sections
from kmine.training.checkpoints import Checkpoints
from kmine.training.task import Task
from kmine.types import ESTIMATED, Decision

NUM_PILOT_IMAGES = 64
"""Unlabeled images on which a threshold without a guarantee is selected: some dozen objects suffice."""


def select_threshold(ctx: RoundContext) -> Calibration | Ranking | None:
    """What the gate of this round goes by: the calibration with a threshold, or a ranking.

    Where the guarantee holds at the calibration's threshold, that one is used. Where the labels are too few for one,
    the threshold keeps as many masks as have a mean estimate of the target; without a calibration the objects are
    ranked, and `gate.keep` of them are kept (all: None). Both are measured on at most `NUM_PILOT_IMAGES` unlabeled
    images and saved as threshold.json.
    """
    task, calibration, keep = ctx.task, ctx.task.calibration, ctx.task.cfg.gate.keep
    if calibration.guarantee.holds if calibration else keep == 1:
        return calibration
    path = task.run.round_dir(ctx.round_idx) / "threshold.json"
    signature = sign("threshold", NUM_PILOT_IMAGES, ctx.signature)
    record = task.run.load_json(path, signature)
    if record is None:
        open_ids = [i for i in task.unlabeled.ids if i not in task.review]
        order = np.random.default_rng(derive_seed(task.cfg.seed, ctx.round_idx, "pilot")).permutation(len(open_ids))
        ids = [open_ids[n] for n in sorted(order[:NUM_PILOT_IMAGES])]
        fitted = _fit_threshold(ctx, _pilot_decisions(replace(ctx, calibration=calibration), ids))
        record = {**fitted, "num_images": len(ids)}
        task.run.save_json(path, record, signature)
    task.progress.log(f"round {ctx.round_idx}: {describe_threshold(record)}")
    if calibration is None:
        return Ranking.from_json(record)
    return replace(calibration, guarantee=replace(calibration.guarantee, threshold=record["threshold"]))


def _fit_threshold(ctx: RoundContext, decisions: Sequence[Decision]) -> dict[str, Any]:
    """Content of threshold.json from decisions on pilot objects that no check of the gate drops."""
    cfg, calibration = ctx.task.cfg.gate, ctx.task.calibration
    if calibration is None:
        ranking = fit_ranking([d.evidence for d in decisions], cfg.keep)
        return {**ranking.to_json(), "keep": cfg.keep, "num_objects": len(decisions)}
    estimates = [d.estimated_dice for d in decisions]
    fitted = threshold_for_mean_estimate(estimates, cfg.target_dice, calibration.guarantee.threshold)
    return {**fitted._asdict(), "target": cfg.target_dice}


def _pilot_decisions(ctx: RoundContext, ids: list[str]) -> list[Decision]:
    """Decisions on the objects in the images `ids` that no check of the gate drops."""
    task, size = ctx.task, ctx.task.mining_batch_size
    task.progress.start(f"round {ctx.round_idx}: selecting the gate's threshold", len(ids))
    found: list[Decision] = []
    for first in range(0, len(ids), size):
        batch = read_batch(ctx, ids[first : first + size])
        probs = predict_probs(ctx, batch)
        prompts, candidates = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
        decisions = gate_batch(ctx, batch, probs, prompts, candidates, predict_auxiliary(ctx, batch))
        ctx.timer.lap("gate")
        found += [d for image in decisions for d in image if d.reason in ESTIMATED]
        task.progress.advance(min(first + size, len(ids)))
    return found


def round_signature(
    task: Task, student: Checkpoints, auxiliary_signature: str = "", parts: Sequence[Checkpoints] = ()
) -> str:
    """Signature of what the pseudo masks of a round are made from: models, segmenter, settings, verdicts."""
    cfg = task.cfg
    settings = signed_sections(cfg, "infer", "prompts", "gate", "refine")
    has_slices = any(task.unlabeled.neighbours(i) for i in task.unlabeled.ids)
    prior = astuple(PRIOR)[: None if has_slices else -len(LATER)]  # that of older rounds, where it is all that counts
    calibration = task.calibration.to_json() if task.calibration else (prior, LIMIT)
    gate_inputs = (calibration, NUM_PILOT_IMAGES)
    further = [task.review.signature] if task.review.signature else []
    if cfg.model.veto and "sks" in cfg.model.name:
        further.append("no veto of images labeled with a lesion")  # older rounds vetoed these, too
    if cfg.prompts.source == "memory":
        further.append(cast(MemorySegmenter, task.segmenter).sign_memory())
    further += sign_areas(cfg.data)
    further += [part.signature for part in parts if part.signature != student.signature]
    models = (student.signature, task.segmenter.signature)
    return sign(*models, settings, gate_inputs, auxiliary_signature, *further)
