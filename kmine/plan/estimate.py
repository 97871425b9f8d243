"""Time and memory that a run will take, by stage, from its settings and what was measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kmine.config import LoopConfig
from kmine.mining.calibration.fit import MIN_OBJECTS
from kmine.plan.fingerprint import Fingerprint
from kmine.plan.machine import Machine
from kmine.plan.probe import SegmenterSpeed, Speed

FLIPS = {"none": 1, "hflip": 2, "flips": 4}
START, CHECK = 12.0, 0.012
"""Seconds to load libraries, check data and write the report; seconds an image and pair compared with all others."""
HANDLED, SCORED = 8.0e-8, 1.2e-7
"""CPU seconds a native pixel to turn probabilities into prompts, evidence and files, and to score a mask."""
SAVED = {False: 0.25, True: 0.5}  # seconds to write the state of a training at every validation (CPU, GPU)
RUN_GB = 0.35  # tables, segmenter, figures


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run by stage, in order, and peak memory: of the GPU, or of the process on a CPU."""

    seconds: dict[str, float]
    peak_gb: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())


def estimate_run(
    cfg: LoopConfig, data: Fingerprint, machine: Machine, speed: Speed, segmenter: SegmenterSpeed
) -> Estimate:
    """Estimate for the settings `cfg`, of folds for all runs, with `speed` at their size and batch size."""
    rounds = cfg.rounds if data.num_unlabeled else 0
    folds = min(cfg.adapt.folds, data.num_labeled) if rounds else 0
    objects = data.num_objects if np.isfinite(data.num_objects) else 1.0
    has_fold_models = folds > 1 and data.num_labeled * objects >= MIN_OBJECTS
    calibrates = rounds > 0 and cfg.gate.mode == "calibrated" and has_fold_models
    adapts = rounds > 0 and cfg.adapt.enabled and segmenter.adapt_step > 0
    mined = _mine_seconds(cfg, data, speed, segmenter, objects)
    fold_steps = min(cfg.adapt.fold_steps or cfg.fit.steps, cfg.fit.steps)
    fold_model = _train_seconds(fold_steps, cfg, data, machine, speed)
    part_models = cfg.crossfit * max(rounds - 1, 0) if cfg.crossfit > 1 else 0
    adaptation = _adapt_seconds(cfg, data, segmenter, objects) if adapts else 0.0
    score = 2 * data.num_val * (speed.infer + SCORED * data.height * data.width)
    again = _train_seconds(cfg.fit.round_steps, cfg, data, machine, speed) + score
    round_0 = _train_seconds(cfg.fit.steps, cfg, data, machine, speed) + score
    once = _train_seconds(cfg.fit.steps + rounds * cfg.fit.round_steps, cfg, data, machine, speed) + score
    seconds = {
        "start": START + min(120, data.num_labeled + data.num_val) * CHECK,
        "reading images": data.num_images * data.read_seconds / min(8, machine.cores),
        "classifier": _classifier_seconds(cfg, speed) * ("sks" in cfg.model.name),
        "round 0": round_0,
        "fold models": folds * fold_model if has_fold_models and (adapts or calibrates) else 0.0,
        "adaptation of the segmenter": adaptation,
        "calibration of the gate": (folds * adaptation + data.num_labeled * mined) if calibrates else 0.0,
        f"{rounds} rounds: mining": rounds * data.num_unlabeled * mined,
        f"{rounds} rounds: training": rounds * again,
        "models of the parts": part_models * again,
        "retraining": once if cfg.retrain and rounds else 0.0,
        "baselines": rounds * again + once if cfg.baseline and rounds else 0.0,
        "other baselines": len(cfg.baseline_models or ()) * (round_0 + rounds * again) if cfg.baseline else 0.0,
    }
    once, runs = "reading images", cfg.data.num_runs
    seconds = {stage: took * (1 if stage == once else runs) for stage, took in seconds.items() if took > 0}
    return Estimate(seconds, speed.peak_gb + RUN_GB)


def _train_seconds(steps: int, cfg: LoopConfig, data: Fingerprint, machine: Machine, speed: Speed) -> float:
    checks = -(-steps // cfg.fit.val_every)
    return steps * speed.step + checks * (data.num_val * speed.infer + SAVED[machine.is_gpu])


def _classifier_seconds(cfg: LoopConfig, speed: Speed) -> float:
    """Half of a training step an image: one of two branches, and no decoder. With patience it ends early."""
    steps = cfg.classifier.steps * (0.6 if cfg.classifier.patience else 1.0)
    return steps * 0.5 * speed.step * cfg.classifier.batch_size / cfg.fit.batch_size


def _mine_seconds(cfg: LoopConfig, data: Fingerprint, speed: Speed, segmenter: SegmenterSpeed, objects: float) -> float:
    """Seconds to mine an image: flips, prompts with all their boxes, evidence, files."""
    prompts = objects * cfg.prompts.passes * (len(cfg.prompts.box_scales) + cfg.prompts.num_jitters)
    network = FLIPS[cfg.infer.tta] * speed.infer + segmenter.encode + prompts * segmenter.prompt
    return network + HANDLED * data.height * data.width * max(objects, 1.0)


def _adapt_seconds(cfg: LoopConfig, data: Fingerprint, segmenter: SegmenterSpeed, objects: float) -> float:
    steps, num_val = cfg.adapt.steps or segmenter.adapt_steps, min(data.num_val, cfg.adapt.max_images) * objects
    checks = 1 + -(-steps // cfg.adapt.val_every)
    return steps * segmenter.adapt_step + checks * num_val * segmenter.prompt
