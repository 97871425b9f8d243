"""Training by the optimizer step: one schedule, one way to choose a checkpoint, one way to resume.

What is trained (local model, classifier) and what its loss is, the stages say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kmine.config import FitConfig
from kmine.training.distributed import sync_batchnorm

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # a second to load, and 260 MB: where nothing is trained, it stays away

StateDict = dict[str, Tensor]
B = TypeVar("B")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class BatchStream(Protocol[B]):
    """Batches that are a function of their step."""

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[B]:
        """Batches of steps [start, stop) in order."""


@dataclass
class FitState:
    """Everything a training needs to go on where it stopped."""

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
    """Running average of the model; empty where none is kept."""

    def to_tensors(self) -> tuple[StateDict, dict[str, Any]]:
        """All tensors under flat names, and what else there is as plain values."""
        groups = {"model": self.model, "best": self.best, "average": self.average}
        flat = {f"{group}/{k}": v for group, state in groups.items() for k, v in state.items()}
        flat |= {f"optimizer/{i}/{k}": v for i, entry in self.optimizer.items() for k, v in entry.items()}
        plain = {"step": self.step, "best_score": self.best_score, "best_step": self.best_step, "history": self.history}
        return flat, plain

    @classmethod
    def from_tensors(cls, tensors: StateDict, plain: dict[str, Any]) -> FitState:
        """The inverse of `to_tensors`."""
        groups: dict[str, StateDict] = {"model": {}, "best": {}, "average": {}}
        optimizer: dict[str, StateDict] = {}
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            if group == "optimizer":
                number, _, key = key.partition("/")
                optimizer.setdefault(number, {})[key] = value
            else:
                groups[group][key] = value
        history = [tuple(entry) for entry in plain["history"]]
        score = {"best_score": plain["best_score"], "best_step": plain["best_step"]}
        return cls(step=plain["step"], optimizer=optimizer, history=history, **score, **groups)


@dataclass(frozen=True)
class FitResult:
    """What a training leaves behind."""

    best: StateDict
    """Weights of the validation with the highest score (the later one of equals)."""
    best_step: int
    final: StateDict
    """Weights after the last step; with `cfg.ema_decay` their average, as everywhere."""
    history: list[tuple[int, float, float]]
    """(step, mean training loss since the last entry, validation score)."""


def train_steps(
    module: ModuleT,
    batches: BatchStream[B],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    cfg: FitConfig,
    *,
    steps: int,
    fabric: Fabric,
    seed: int,
    validate: Callable[[ModuleT], float],
    resume: FitState | None = None,
    save: Callable[[FitState], None] | None = None,
    progress: Callable[[int, float, float], None] | None = None,
    prepare: Callable[[nn.Module, B, int, EMA | None], Any] | None = None,
) -> FitResult:
    """Train `module` in place for `steps` steps of AdamW, linear warm-up and cosine decay.

    Validates every `cfg.val_every` steps and at the end. With `cfg.ema_decay` a running average of the weights (batch
    norm's included) is what is validated, chosen and returned, `final` too: what is kept is always one and the same
    kind of model. The average only looks on; the weights are trained as without it, and are what `module` ends with.

    Args:
        module: starts from the weights it has; its state dict is what is kept.
        batches: batch of each step.
        loss_fn: (learner as set up by fabric, batch) -> scalar loss.
        cfg: learning rate, weight decay, warm-up, decay of the average, interval of validation, workers.
        steps: the budget.
        fabric: device, precision, and the other processes, where there are any.
        seed: for layers that draw numbers (dropout); with the step it fixes them.
        validate: score of the learner, put to eval; higher is better, NaN counts as 0.
        resume: go on from here; the result equals that of an undisturbed training.
        save: called with the state after every validation but the last.
        progress: called every tenth step with (step, loss, last score).
        prepare: called before each loss with (learner, put to eval, batch, step, average); `loss_fn` is then given what
            comes back in place of the batch. What the average, or the learner as it stands, has to say comes in here.
    """
    sync_batchnorm(module, fabric)
    optimizer = torch.optim.AdamW(module.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    wrapped, optimizer = fabric.setup(module, optimizer)
    state = resume or FitState(0, {}, {}, _copy(module), -math.inf, 0)
    if resume:
        module.load_state_dict(resume.model)
        _load_optimizer(optimizer, resume.optimizer)
    ema = EMA(module, cfg.ema_decay, state.average) if cfg.ema_decay else None
    losses: list[Tensor] = []
    last_score = state.history[-1][2] if state.history else math.nan
    for step, batch in enumerate(batches.stream(state.step, steps, cfg.num_workers), start=state.step):
        torch.manual_seed((seed + step) % 2**63)
        if prepare:
            module.eval()
            batch = prepare(wrapped, batch, step, ema)
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, cfg)
        losses.append(_step(optimizer, fabric, loss_fn(wrapped, batch)))
        if ema:
            ema.update(step)
        done = step + 1
        if progress and (done % 10 == 0 or done == steps):  # reading the loss waits for the device
            progress(done, float(losses[-1]), last_score)
        if done % cfg.val_every == 0 or done == steps:
            with ema.applied() if ema else nullcontext():
                last_score = _run_validation(module, validate, state, done, losses)
            losses = []
            if save and done < steps:
                state.step, state.model, state.optimizer = done, _copy(module), _optimizer_state(optimizer)
                state.average = ema.state() if ema else {}
                save(state)
    with ema.applied() if ema else nullcontext():
        return FitResult(state.best, state.best_step, _copy(module), state.history)


class EMA:
    """Exponential moving average of a module's weights and buffers, beside the module that is trained.

    A step keeps `min(decay, (1 + step) / (10 + step))` of the average: little at first, so that the first weights,
    which are those of nothing learned, do not linger. Whole numbers (batch norm's counter) are copied.
    """

    def __init__(self, module: nn.Module, decay: float, state: StateDict | None = None) -> None:
        """Begin with the weights that `module` has, or go on with an average that was saved as `state`."""
        self.module = module
        self.decay = decay
        self._live = module.state_dict()
        """Views of the module's own tensors: they follow the training."""
        self._mean = {k: v.detach().clone() for k, v in self._live.items()}
        for k, v in (state or {}).items():
            self._mean[k].copy_(v)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the module's weights after `step` (0, 1, ...)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for mean, now in zip(self._mean.values(), self._live.values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the module has the averaged weights; afterwards it has its own again."""
        own = {k: v.detach().clone() for k, v in self._live.items()}
        self.module.load_state_dict(self._mean)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state(self) -> StateDict:
        """A copy of the average, on the CPU."""
        return {k: v.cpu().clone() for k, v in self._mean.items()}


def _step(optimizer: torch.optim.Optimizer, fabric: Fabric, loss: Tensor) -> Tensor:
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def learning_rate(step: int, steps: int, cfg: FitConfig) -> float:
    """Rate of `step` (0, 1, ...) of `steps`: linear warm-up over `cfg.warmup` of them, then cosine decay to zero."""
    warmup = cfg.warmup * steps
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _run_validation(
    module: ModuleT, validate: Callable[[ModuleT], float], state: FitState, done: int, losses: list[Tensor]
) -> float:
    module.eval()
    score = float(np.nan_to_num(validate(module)))
    state.history.append((done, float(torch.stack(losses).mean()), score))
    if score >= state.best_score:
        state.best, state.best_score, state.best_step = _copy(module), score, done
    return score


def _copy(module: nn.Module) -> StateDict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, StateDict]:
    entries = optimizer.state_dict()["state"]
    return {str(i): {k: torch.as_tensor(v).cpu().clone() for k, v in entry.items()} for i, entry in entries.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, StateDict]) -> None:
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(i): entry for i, entry in state.items()}, "param_groups": groups})
