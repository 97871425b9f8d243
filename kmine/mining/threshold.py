"""The gate's threshold of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import threshold_for_mean_estimate
from kmine.mining.candidates import (
    BATCH_SIZE,
    CandidateBatch,
    gate_batch,
)
from kmine.ops.calibrator import Calibration, describe_threshold
from kmine.seeding import derive_seed
from kmine.training.task import Checkpoints, Task
from kmine.types import ESTIMATED

NUM_PILOT_IMAGES = 64
"""Unlabeled images that settle a round's threshold where the labels promise nothing: a few dozen estimates will do."""


def select_threshold_for_round(
    task: Task,
    propose: Callable[[Sequence[str]], CandidateBatch],
    area_prior: dict[int, float],
    round_idx: int,
    threshold_signature: str,
) -> Calibration | None:
    """What the gate goes by in this round.

    Where the labels promise the target at a threshold, that one holds. Where they are too few for it, so many masks
    are kept that their mean estimate reaches the target, seen on at most `PILOT` unlabeled images.
    """
    calibration = task.calibration
    if calibration is None or calibration.guarantee.kept:
        return calibration
    path, threshold_signature = (
        task.run.round_dir(round_idx) / "threshold.json",
        sign("threshold", NUM_PILOT_IMAGES, threshold_signature),
    )
    record = task.run.load_json(path, threshold_signature)
    if record is None:
        open_ids = [i for i in task.unlabeled.ids if i not in task.review]
        order = np.random.default_rng(derive_seed(task.cfg.seed, round_idx, "pilot")).permutation(len(open_ids))
        ids = [open_ids[n] for n in sorted(order[:NUM_PILOT_IMAGES])]
        task.progress.start(f"round {round_idx}: settling the gate", len(ids))
        estimates: list[float] = []
        for first in range(0, len(ids), BATCH_SIZE):
            decisions = gate_batch(propose(ids[first : first + BATCH_SIZE]), area_prior, task.cfg, calibration)
            estimates += [d.estimated_dice for batch in decisions for d in batch if d.reason in ESTIMATED]
            task.progress.advance(min(first + BATCH_SIZE, len(ids)))
        fitted = threshold_for_mean_estimate(estimates, task.cfg.gate.target_dice, calibration.guarantee.threshold)
        record = {**fitted._asdict(), "target": task.cfg.gate.target_dice, "num_images": len(ids)}
        task.run.save_json(path, record, threshold_signature)
    task.progress.log(f"round {round_idx}: {describe_threshold(record)}")
    return replace(calibration, guarantee=replace(calibration.guarantee, threshold=record["threshold"]))


def round_signature(task: Task, current: Checkpoints, auxiliary_signature: str = "") -> str:
    """What the pseudo masks of a round are made from: model, segmenter, settings."""
    cfg = task.cfg
    settings = [asdict(section) for section in (cfg.infer, cfg.prompts, cfg.gate, cfg.refine)]
    gate_inputs = (task.calibration.to_json(), NUM_PILOT_IMAGES) if task.calibration else None
    review = [task.review.signature] if task.review.signature else []
    return sign(current.signature, task.segmenter.signature, settings, gate_inputs, auxiliary_signature, *review)
