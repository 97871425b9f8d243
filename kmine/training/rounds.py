"""Rounds of training without mining."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kmine.models.base import LocalModel
from kmine.training.evaluation import evaluate_round
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import RoundResult


def trained_auxiliary_model(
    task: Task, method_dir: str = "witness", part: Callable[[Task], Task] = lambda task: task
) -> tuple[LocalModel, str] | None:
    """The auxiliary model, trained on the labels as in round 0, and the signature of its training.

    It is never trained on pseudo masks, so errors of the loop do not reach it. `part` makes the task of its training,
    such as one with fewer labels; its initial weights, with the classifier of sks, are those of the whole task. None if
    the task has no such model.
    """
    if task.auxiliary_model is None:
        return None
    auxiliary_task = replace(task, cfg=replace(task.cfg, model=task.auxiliary_model), auxiliary_model=None)
    model = new_model(auxiliary_task)
    trained = train(part(auxiliary_task), model, round_idx=0, method_dir=method_dir)
    model.load_state_dict(trained.best)
    return model, trained.signature


def train_rounds(
    task: Task,
    method_dir: str,
    round_inputs: Callable[[int], dict[str, Any] | None] = lambda round_idx: {},
    *,
    first_dir: str = "",
    once_inputs: Callable[[int], dict[str, Any]] | None = None,
) -> Iterator[RoundResult]:
    """Round 0 as in the loop, then `rounds` times `fit.round_steps` steps, each from the last adopted round.

    Round 0 is that of the loop, in the run folder itself, or lies in `first_dir`. `round_inputs` maps a round to
    arguments of `train` (`pseudo` and `pseudo_signature`, or `consistency`); None ends the rounds. With `retrain`, and
    such arguments, a model trained once with the last ones follows, or with those of `once_inputs`, a function of its
    number of steps.
    """
    model = new_model(task)
    current = train(task, model, round_idx=0, method_dir=first_dir)
    adopted = evaluate_round(task, model, current, round_idx=0, method_dir=first_dir)
    yield adopted
    rounds, last_inputs = [adopted], {}
    for round_idx in range(1, task.cfg.rounds + 1):
        if (inputs := round_inputs(round_idx)) is None:
            break
        place = {"round_idx": round_idx, "method_dir": method_dir}
        candidate = train(task, model, start=current, **place, **inputs)
        num_pseudo = len(inputs.get("pseudo") or ())
        result = evaluate_round(task, model, candidate, num_pseudo=num_pseudo, reference=adopted, **place)
        yield result
        rounds.append(result)
        last_inputs = inputs
        if result.adopted:
            current, adopted = candidate, result
    if last_inputs and task.cfg.retrain:
        once = {"round_idx": len(rounds), "method_dir": method_dir, "reference": kept_round(rounds)}
        inputs = once_inputs(steps_once(task, len(rounds) - 1)) if once_inputs else last_inputs
        yield train_once(task, len(rounds) - 1, **once, **inputs)


def steps_once(task: Task, num_rounds: int) -> int:
    """Steps of a model that is trained once: those of round 0 and of `num_rounds` rounds."""
    return task.cfg.fit.steps + num_rounds * task.cfg.fit.round_steps


def train_once(
    task: Task,
    num_rounds: int,
    *,
    round_idx: int,
    method_dir: str = "",
    reference: RoundResult | None = None,
    **inputs: Any,
) -> RoundResult:
    """Train a new model in one schedule over the steps of round 0 and of `num_rounds` rounds, and evaluate it.

    It has the initial weights and the learning rate of round 0. Its folder is that of round `round_idx`. It is adopted
    if its score on validation is not below that of `reference`, the best round. `inputs` are arguments of `train`.
    """
    fit = task.cfg.fit
    one_schedule = replace(fit, round_steps=steps_once(task, num_rounds), round_lr=fit.lr)
    task = replace(task, cfg=replace(task.cfg, fit=one_schedule))
    place = {"round_idx": round_idx, "method_dir": method_dir}
    model = new_model(task)
    trained = train(task, model, **place, **inputs)
    known = {"num_pseudo": len(inputs.get("pseudo") or ()), "retrained": True}
    return evaluate_round(task, model, trained, reference=reference, **place, **known)


def kept_round(rounds: Sequence[RoundResult]) -> RoundResult:
    """The round whose model is kept: of the adopted ones that of the highest score on validation, of equals the last.

    Round 0 counts as adopted, and so does a retrained model that is not below all others.
    """
    return max((result for result in rounds if result.adopted), key=lambda r: (r.metrics.score, r.round_idx))
