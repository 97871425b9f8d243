"""The gate's threshold of a round, and the signature of what a round is mined with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import threshold_for_mean_estimate
from kmine.mining.candidates import gate_batch, generate_prompts, predict_probs, read_batch, segment_prompts
from kmine.mining.context import RoundContext
from kmine.ops.calibrator import Calibration, describe_threshold
from kmine.seeding import derive_seed
from kmine.store.settings import signed_sections
from kmine.training.checkpoints import Checkpoints
from kmine.training.task import Task
from kmine.types import ESTIMATED

NUM_PILOT_IMAGES = 64
"""Unlabeled images on which a threshold without a guarantee is selected: some dozen estimates suffice."""


def select_threshold(ctx: RoundContext) -> Calibration | None:
    """The calibration with the threshold of this round; None without a calibration.

    Where the guarantee holds at the calibration's threshold, that one is used. Where the labels are too few for one,
    the threshold keeps as many masks as have a mean estimate of the target, measured on at most `NUM_PILOT_IMAGES`
    unlabeled images and saved as threshold.json.
    """
    task, calibration = ctx.task, ctx.calibration
    if calibration is None or calibration.guarantee.holds:
        return calibration
    path = task.run.round_dir(ctx.round_idx) / "threshold.json"
    signature = sign("threshold", NUM_PILOT_IMAGES, ctx.signature)
    record = task.run.load_json(path, signature)
    if record is None:
        open_ids = [i for i in task.unlabeled.ids if i not in task.review]
        order = np.random.default_rng(derive_seed(task.cfg.seed, ctx.round_idx, "pilot")).permutation(len(open_ids))
        ids = [open_ids[n] for n in sorted(order[:NUM_PILOT_IMAGES])]
        target = task.cfg.gate.target_dice
        fitted = threshold_for_mean_estimate(_pilot_estimates(ctx, ids), target, calibration.guarantee.threshold)
        record = {**fitted._asdict(), "target": target, "num_images": len(ids)}
        task.run.save_json(path, record, signature)
    task.progress.log(f"round {ctx.round_idx}: {describe_threshold(record)}")
    return replace(calibration, guarantee=replace(calibration.guarantee, threshold=record["threshold"]))


def _pilot_estimates(ctx: RoundContext, ids: list[str]) -> list[float]:
    """Estimated Dice of the objects in the images `ids` that no check of the gate drops."""
    task, size = ctx.task, ctx.task.mining_batch_size
    task.progress.start(f"round {ctx.round_idx}: selecting the gate's threshold", len(ids))
    estimates: list[float] = []
    for first in range(0, len(ids), size):
        batch = read_batch(ctx, ids[first : first + size])
        probs = predict_probs(ctx, batch)
        prompts, candidates = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
        decisions = gate_batch(ctx, batch, probs, prompts, candidates)
        estimates += [d.estimated_dice for image in decisions for d in image if d.reason in ESTIMATED]
        task.progress.advance(min(first + size, len(ids)))
    return estimates


def round_signature(task: Task, student: Checkpoints, auxiliary_signature: str = "") -> str:
    """Signature of what the pseudo masks of a round are made from: models, segmenter, settings, verdicts."""
    cfg = task.cfg
    settings = signed_sections(cfg, "infer", "prompts", "gate", "refine")
    gate_inputs = (task.calibration.to_json(), NUM_PILOT_IMAGES) if task.calibration else None
    further = [task.review.signature] if task.review.signature else []
    if cfg.model.veto and "sks" in cfg.model.name:
        further.append("no veto of images labeled with a lesion")  # older rounds vetoed these, too
    return sign(student.signature, task.segmenter.signature, settings, gate_inputs, auxiliary_signature, *further)
