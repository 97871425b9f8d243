"""Rounds of training without mining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kmine.models.base import LocalModel
from kmine.training.evaluation import evaluate_round
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import RoundResult


def trained_auxiliary_model(task: Task, method_dir: str = "witness") -> tuple[LocalModel, str] | None:
    """The second local model, trained on the labels alone as round 0 trains the first, and its signature.

    It sees no pseudo mask in any round, so the loop's own mistakes cannot reach it. None where there is none.
    """
    if task.auxiliary_model is None:
        return None
    auxiliary_task = replace(task, cfg=replace(task.cfg, model=task.auxiliary_model), auxiliary_model=None)
    model = new_model(auxiliary_task)
    trained = train(auxiliary_task, model, round_idx=0, method_dir=method_dir)
    model.load_state_dict(trained.best)
    return model, trained.signature


def train_rounds(
    task: Task,
    method_dir: str,
    round_inputs: Callable[[int], dict[str, Any] | None] = lambda round_idx: {},
) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then `rounds` times `fit.round_steps` more, each from the last adopted round.

    `how` says for a round what `train` is given beside the labels (`pseudo`, `consistency`); None ends it.
    """
    model = new_model(task)
    current = train(task, model, round_idx=0)
    adopted = evaluate_round(task, model, current, round_idx=0)
    yield adopted
    for round_idx in range(1, task.cfg.rounds + 1):
        if (inputs := round_inputs(round_idx)) is None:
            return
        fitted = train(task, model, round_idx=round_idx, start=current, method_dir=method_dir, **inputs)
        context = {"num_pseudo": len(inputs.get("pseudo") or ()), "reference": adopted, "method_dir": method_dir}
        result = evaluate_round(task, model, fitted, round_idx=round_idx, **context)
        yield result
        if result.adopted:
            current, adopted = fitted, result
