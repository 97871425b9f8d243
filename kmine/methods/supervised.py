"""The baseline: training on labels alone, for as many optimizer steps as mining has."""

from __future__ import annotations

from collections.abc import Iterator

from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "supervised"


def supervised(task: Task) -> Iterator[RoundResult]:
    """Round 0 of mining, then `rounds` times `fit.round_steps` more steps on the same labels.

    Schedule, averaging, checkpoint selection and adoption rule are those of mining, so only the pseudo masks differ.
    CutMix mixes labeled images with one another.
    """
    return train_rounds(task, METHOD_DIR)
