"""The baseline: the labels alone, for as many optimizer steps as mining had."""

from __future__ import annotations

from collections.abc import Iterator

from kmine.methods import Task, new_model, score, train
from kmine.records import RoundResult
from kmine.store import RunStore

ARM = "supervised"


def supervised(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then `rounds` times `fit.round_steps` more steps on the same labels.

    The same schedule, averaging, checkpoint choice and adoption rule as the loop's, so that only the pseudo masks
    differ; CutMix mixes the labeled images with one another.
    """
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    for round_idx in range(1, task.cfg.rounds + 1):
        fitted = train(task, store, model, round_idx=round_idx, start=current, arm=ARM)
        result = score(task, store, model, fitted, round_idx=round_idx, before=adopted, arm=ARM)
        yield result
        if result.adopted:
            current, adopted = fitted, result
