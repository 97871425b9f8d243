"""Rounds of training without mining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kmine.models.base import LocalModel
from kmine.store.run_folder import RunStore
from kmine.training.evaluation import score
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import RoundResult


def trained_witness(task: Task, store: RunStore, arm: str = "witness") -> tuple[LocalModel, str] | None:
    """The second local model, trained on the labels alone as round 0 trains the first, and its signature.

    It sees no pseudo mask in any round, so the loop's own mistakes cannot reach it. None where there is none.
    """
    if task.witness is None:
        return None
    its = replace(task, cfg=replace(task.cfg, model=task.witness), witness=None)
    model = new_model(its, store)
    trained = train(its, store, model, round_idx=0, arm=arm)
    model.load_state_dict(trained.best)
    return model, trained.signature


def train_rounds(
    task: Task, store: RunStore, arm: str, how: Callable[[int], dict[str, Any] | None] = lambda round_idx: {}
) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then `rounds` times `fit.round_steps` more, each from the last adopted round.

    `how` says for a round what `train` is given beside the labels (`pseudo`, `consistency`); None ends it.
    """
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    for round_idx in range(1, task.cfg.rounds + 1):
        if (given := how(round_idx)) is None:
            return
        fitted = train(task, store, model, round_idx=round_idx, start=current, arm=arm, **given)
        more = {"num_pseudo": len(given.get("pseudo") or ()), "before": adopted, "arm": arm}
        result = score(task, store, model, fitted, round_idx=round_idx, **more)
        yield result
        if result.adopted:
            current, adopted = fitted, result
