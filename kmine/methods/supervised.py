"""The baseline: the labels alone, for as many optimizer steps as mining had."""

from __future__ import annotations

from collections.abc import Iterator

from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "supervised"


def supervised(task: Task) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then `rounds` times `fit.round_steps` more steps on the same labels.

    The same schedule, averaging, checkpoint choice and adoption rule as the loop's, so that only the pseudo masks
    differ; CutMix mixes the labeled images with one another.
    """
    return train_rounds(task, METHOD_DIR)
