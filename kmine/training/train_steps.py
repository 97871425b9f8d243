"""The training loop: AdamW steps, one learning-rate schedule, checkpoint selection, resuming.

The trained module (local model, classifier) and its loss are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kmine.config import FitConfig
from kmine.models.sync_batchnorm import sync_batchnorm
from kmine.training.distributed import Fabric
from kmine.training.ema import EMA
from kmine.types import ProgressReporter

StateDict = dict[str, Tensor]
B = TypeVar("B")
BatchT = TypeVar("BatchT", covariant=True)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
LossFn = Callable[[nn.Module, B, int, EMA | None], Tensor]
"""(module as set up by Fabric, in train mode; batch; step; running average or None) -> scalar loss."""


class BatchStream(Protocol[BatchT]):
    """Batches that are a function of their step."""

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[BatchT]:
        """Batches of steps [start, stop) in order."""


@dataclass
class FitState:
    """Everything needed to resume a training."""

    step: int
    """Optimizer steps done."""
    model: StateDict
    optimizer: dict[str, StateDict]
    """AdamW's state by parameter number: step, exp_avg, exp_avg_sq."""
    best: StateDict
    best_score: float
    best_step: int
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, mean training loss since the last entry, validation score)."""
    average: StateDict = field(default_factory=dict)
    """Running average of the model; empty without one."""
    scores_empty: bool = True
    """Whether `best_score` counts images that are empty in truth and prediction; older states left them out."""

    def to_tensors(self) -> tuple[StateDict, dict[str, Any]]:
        """All tensors under flat names, and the other fields as JSON values."""
        groups = {"model": self.model, "best": self.best, "average": self.average}
        flat = {f"{group}/{k}": v for group, state in groups.items() for k, v in state.items()}
        flat |= {f"optimizer/{i}/{k}": v for i, entry in self.optimizer.items() for k, v in entry.items()}
        names = ("step", "best_score", "best_step", "history", "scores_empty")
        return flat, {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: StateDict, plain: dict[str, Any]) -> FitState:
        """The inverse of `to_tensors`."""
        groups: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "best": {}, "average": {}}
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            entry = groups[group]
            if group == "optimizer":
                number, _, key = key.partition("/")
                entry = entry.setdefault(number, {})
            entry[key] = value
        return cls(**groups, **{"scores_empty": False} | plain | {"history": [tuple(row) for row in plain["history"]]})


@dataclass(frozen=True)
class FitResult:
    """Outcome of a training."""

    best: StateDict
    """Weights of the validation with the highest score (the latest of equals)."""
    best_step: int
    final: StateDict
    """Weights after the last step; with `cfg.ema_decay` their running average."""
    history: list[tuple[int, float, float]]
    """(step, mean training loss since the last entry, validation score)."""


@dataclass(frozen=True)
class Callbacks(Generic[ModuleT]):
    """Functions that a training calls."""

    validate: Callable[[ModuleT], float]
    """Score of the module, which is in eval mode; higher is better, NaN counts as 0."""
    save: Callable[[FitState], None] | None = None
    """Called with the state after every validation but the last; the state of a training that stopped is not saved."""
    progress: Callable[[int, float, float], None] | None = None
    """Called every tenth step with (step, loss, last score)."""
    stop: Callable[[Sequence[tuple[int, float, float]]], bool] | None = None
    """Called with the history after every validation; true ends the training there."""


def show_progress(reporter: ProgressReporter, score_name: str) -> Callable[[int, float, float], None]:
    """`Callbacks.progress` that sends loss and score to `reporter`; a NaN score is left out."""

    def progress(done: int, loss: float, score: float) -> None:
        text = f"loss {loss:.3f}" + f"  validation {score_name} {score:.3f}" * bool(np.isfinite(score))
        reporter.advance(done, text)

    return progress


def train_steps(
    module: ModuleT,
    batches: BatchStream[B],
    loss_fn: LossFn[B],
    cfg: FitConfig,
    *,
    fabric: Fabric,
    seed: int,
    callbacks: Callbacks[ModuleT],
    resume: FitState | None = None,
) -> FitResult:
    """Train `module` in place, from its current weights, for `cfg.steps` steps of AdamW, or until `callbacks.stop`.

    Validates every `cfg.val_every` steps and at the end. With `cfg.ema_decay` a running average of weights and buffers
    is validated, selected and returned, as `final` too; it does not affect the trained weights.

    Args:
        module: checkpoints are its state dict.
        batches: batch of each step.
        loss_fn: see `LossFn`.
        cfg: steps, learning rate, weight decay, warm-up, decay of the average, validation interval, workers.
        fabric: device, precision, other processes.
        seed: together with the step it fixes the random numbers of layers (dropout).
        callbacks: validation, saving, progress.
        resume: state to continue from; the result equals that of an uninterrupted training.
    """
    if fabric.world_size > 1:
        sync_batchnorm(module, fabric.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    net, optimizer = fabric.setup(module, optimizer)
    state = resume or FitState(0, {}, {}, _copy(module), -math.inf, 0)
    if resume:
        if not resume.scores_empty:
            module.load_state_dict(resume.best)
            state.best_score, state.scores_empty = _score(module, callbacks.validate), True
        module.load_state_dict(resume.model)
        _load_optimizer(optimizer, resume.optimizer)
    ema = EMA(module, cfg.ema_decay, state.average) if cfg.ema_decay else None
    losses: list[Tensor] = []
    for step, batch in enumerate(batches.stream(state.step, cfg.steps, cfg.num_workers), start=state.step):
        torch.manual_seed((seed + step) % 2**63)
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        losses.append(_step(optimizer, fabric, loss_fn(net, batch, step, ema)))
        if ema:
            ema.update(step)
        done = step + 1
        if callbacks.progress and (done % 10 == 0 or done == cfg.steps):  # reading the loss waits for the device
            callbacks.progress(done, float(losses[-1]), state.history[-1][2] if state.history else math.nan)
        if done % cfg.val_every == 0 or done == cfg.steps:
            with ema.applied() if ema else nullcontext():
                _validate(module, callbacks.validate, state, done, losses)
            losses = []
            if callbacks.stop and callbacks.stop(state.history):
                break
            if callbacks.save and done < cfg.steps:
                state.step, state.model, state.optimizer = done, _copy(module), _optimizer_state(optimizer)
                state.average = ema.state() if ema else {}
                callbacks.save(state)
    with ema.applied() if ema else nullcontext():
        return FitResult(state.best, state.best_step, _copy(module), state.history)


def learning_rate(step: int, cfg: FitConfig) -> float:
    """Rate of `step` (0, 1, ...): linear warm-up over a share `cfg.warmup` of all steps, then cosine decay to zero."""
    warmup = cfg.warmup * cfg.steps
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cfg.steps - warmup)))


def _step(optimizer: torch.optim.Optimizer, fabric: Fabric, loss: Tensor) -> Tensor:
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _validate(
    module: ModuleT, validate: Callable[[ModuleT], float], state: FitState, done: int, losses: list[Tensor]
) -> None:
    """Add an entry to the history of `state`, and replace its best checkpoint unless the score is lower."""
    score = _score(module, validate)
    state.history.append((done, float(torch.stack(losses).mean()), score))
    if score >= state.best_score:
        state.best, state.best_score, state.best_step = _copy(module), score, done


def _score(module: ModuleT, validate: Callable[[ModuleT], float]) -> float:
    module.eval()
    return float(np.nan_to_num(validate(module)))


def _copy(module: nn.Module) -> StateDict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, StateDict]:
    entries = optimizer.state_dict()["state"]
    return {str(i): {k: torch.as_tensor(v).cpu().clone() for k, v in entry.items()} for i, entry in entries.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, StateDict]) -> None:
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(i): entry for i, entry in state.items()}, "param_groups": groups})
