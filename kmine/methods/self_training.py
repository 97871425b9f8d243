"""Self-training: mining with the identity segmenter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kmine.training.task import Task
from kmine.types import RoundResult


def self_training(task: Task) -> Iterator[RoundResult]:
    """Mining with an echo in the segmenter's place: the local model's own masks, by the same gate, rounds and training.

    A calibrated gate is calibrated with the echo. There is nothing to adapt, to propose or to ask a second time.
    """
    from kmine.methods.mining import mine
    from kmine.mining.calibration.step import calibrate
    from kmine.segmenters.identity import IdentitySegmenter

    if not task.cfg.rounds:
        return mine(task)
    prompts = replace(task.cfg.prompts, source="local", passes=1)
    identity = IdentitySegmenter()
    task = replace(task, cfg=replace(task.cfg, prompts=prompts), segmenter=identity)
    return mine(calibrate(task, identity))
