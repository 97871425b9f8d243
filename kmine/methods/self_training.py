"""Self-training: mining with the identity segmenter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kmine.data.person_prompts import NO_PERSON
from kmine.methods.mining import mine
from kmine.mining.calibration.local_quality import without_segmenter
from kmine.mining.calibration.step import calibrate
from kmine.segmenters.identity import IdentitySegmenter
from kmine.training.task import Task
from kmine.types import RoundResult


def self_training(task: Task) -> Iterator[RoundResult]:
    """Mining whose segmenter returns the local model's own masks; gate, rounds and training are those of mining.

    A calibrated gate is calibrated with that segmenter. Fine-tuning, proposals, several boxes, places of middling
    probability, prompts of a person and a second pass do not apply.
    """
    if not task.cfg.rounds:
        return mine(task)
    identity = IdentitySegmenter()
    cfg = replace(task.cfg, prompts=without_segmenter(task.cfg.prompts))
    task = replace(task, cfg=cfg, segmenter=identity, person=NO_PERSON)
    return mine(calibrate(task, identity))
