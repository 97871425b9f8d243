"""The training loop: AdamW steps, one learning-rate schedule, choice of the checkpoint, resuming.

The trained module (local model, classifier) and its loss are arguments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kmine.config import FitConfig
from kmine.models.sync_batchnorm import sync_batchnorm
from kmine.ops.statistics import is_fall
from kmine.training.distributed import Fabric
from kmine.training.ema import EMA
from kmine.training.optimizer import (
    StateDict,
    learning_rate,
    load_optimizer,
    make_optimizer,
    optimizer_state,
    set_rate,
)
from kmine.types import Floats, ProgressReporter

DIVERGED = 0.05
"""Fall of the validation score, from the best to the last, beyond which a training may count as diverged."""
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
    """AdamW's state by the parameter's number in `module.parameters()`: step, exp_avg, exp_avg_sq."""
    best: StateDict
    best_score: float
    best_step: int
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, mean training loss since the last entry, validation score)."""
    average: StateDict = field(default_factory=dict)
    """Running average of the model; empty without one."""
    clock: list[tuple[float, float]] = field(default_factory=list)
    """(learning rate, Unix time) of each entry of the history; older states lack the first ones."""
    scores_empty: bool = True
    """Whether `best_score` counts images that are empty in truth and prediction; older states left them out."""
    best_scores: list[float] = field(default_factory=list)
    """Scores whose mean `best_score` is."""

    def to_tensors(self) -> tuple[StateDict, dict[str, Any]]:
        """All tensors under flat names, and the other fields as JSON values."""
        groups = {"model": self.model, "best": self.best, "average": self.average}
        flat = {f"{group}/{k}": v for group, state in groups.items() for k, v in state.items()}
        flat |= {f"optimizer/{i}/{k}": v for i, entry in self.optimizer.items() for k, v in entry.items()}
        names = ("step", "best_score", "best_step", "history", "clock", "scores_empty", "best_scores")
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
        rows = {name: [tuple(row) for row in plain.get(name, ())] for name in ("history", "clock")}
        return cls(**groups, **{"scores_empty": False} | plain | rows)


@dataclass(frozen=True)
class FitResult:
    """Outcome of a training."""

    best: StateDict
    """Weights to use, by `cfg.checkpoint`."""
    best_step: int
    """Their step."""
    final: StateDict
    """Weights after the last step; with `cfg.ema_decay` their running average."""
    history: list[tuple[int, float, float]]
    """(step, mean training loss since the last entry, validation score)."""
    has_diverged: bool = False
    """Whether the last weights were to be used and are not, as validation fell."""
    clock: list[tuple[float, float]] = field(default_factory=list)
    """As in `FitState`."""


Validate = Callable[[ModuleT], float | Sequence[float]]


@dataclass(frozen=True)
class Callbacks(Generic[ModuleT]):
    """Functions that a training calls."""

    validate: Validate[ModuleT]
    """Score of the module, which is in eval mode, or scores of the same images in the same order, of which the mean
    counts; higher is better, NaN counts as 0. A `FloatingPointError` counts as divergence after the first score."""
    save: Callable[[FitState], None] | None = None
    """Called in another thread with the state after a validation, but not after the last; the state of a training that
    stopped is not saved."""
    save_every_s: float = 0.0
    """Seconds between two of these calls, at least; the first validation is always saved."""
    progress: Callable[[int, float, float], None] | None = None
    """Called every tenth step with (step, loss, last score)."""
    stop: Callable[[Sequence[tuple[int, float, float]]], bool] | None = None
    """Called with the history after every validation; true ends the training there."""
    record: Callable[[Sequence[tuple[int, float, float]], Sequence[tuple[float, float]]], None] | None = None
    """Called with the history and its clock after every validation."""


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
    is validated and returned; it does not affect the trained weights. With `cfg.checkpoint` last the result is that
    of the last step, unless validation fell since its best by more than `DIVERGED` and by more than noise, which is
    much where there are few images (`kmine.ops.statistics.is_fall`).

    Args:
        module: checkpoints are its state dict.
        batches: batch of each step.
        loss_fn: see `LossFn`.
        cfg: steps, rates, weight decay, warm-up, decay of the average, checkpoint, validation interval, workers.
        fabric: device, precision, other processes.
        seed: together with the step it fixes the random numbers of layers (dropout).
        callbacks: validation, saving, progress.
        resume: state to continue from; the result equals that of an uninterrupted training.
    """
    if fabric.world_size > 1:
        sync_batchnorm(module, fabric.device)
    net, optimizer = fabric.setup(module, make_optimizer(module, cfg))
    state = resume or FitState(0, {}, {}, _copy(module), -math.inf, 0)
    if resume:
        if not resume.scores_empty:
            module.load_state_dict(resume.best)
            state.best_scores = np.atleast_1d(_scores(module, callbacks.validate, first=True)).tolist()
            state.best_score, state.scores_empty = float(np.mean(state.best_scores)), True
        module.load_state_dict(resume.model)
        load_optimizer(optimizer, module, resume.optimizer)
    ema = EMA(module, cfg.ema_decay, state.average) if cfg.ema_decay else None
    losses: list[Tensor] = []
    scores: Floats = np.zeros(())
    with _Saver(callbacks) as saver:
        for step, batch in enumerate(batches.stream(state.step, cfg.steps, cfg.num_workers), start=state.step):
            torch.manual_seed((seed + step) % 2**63)
            module.train()
            set_rate(optimizer, step, cfg)
            fabric.backward(loss := loss_fn(net, batch, step, ema))
            if cfg.clip_grad:
                fabric.clip_gradients(net, optimizer, max_norm=cfg.clip_grad, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if ema:
                ema.update(step)
            done = step + 1
            if callbacks.progress and (done % 10 == 0 or done == cfg.steps):  # reading the loss waits for the device
                callbacks.progress(done, float(losses[-1]), state.history[-1][2] if state.history else math.nan)
            if done % cfg.val_every == 0 or done == cfg.steps:
                with ema.applied() if ema else nullcontext():
                    scores = _validate(module, callbacks, state, losses, done, learning_rate(step, cfg))
                losses = []
                if callbacks.stop and callbacks.stop(state.history):
                    break
                if done < cfg.steps and saver.is_due():
                    state.step, state.model, state.optimizer = done, _copy(module), optimizer_state(optimizer, module)
                    state.average = ema.state() if ema else {}
                    saver.save(state)
    with ema.applied() if ema else nullcontext():
        return _result(cfg, state, _copy(module), scores)


class _Saver:
    """Saves states beside the training, one at a time; an error is raised at the next state or at the end."""

    def __init__(self, callbacks: Callbacks[Any]) -> None:
        self._callbacks, self._last = callbacks, -math.inf
        self._writer, self._writing = ThreadPoolExecutor(1, "save"), Future[None]()
        self._writing.set_result(None)

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        if kind is None:
            self._writing.result()

    def is_due(self) -> bool:
        """Whether a state is to be saved now."""
        return self._callbacks.save is not None and time.monotonic() - self._last >= self._callbacks.save_every_s

    def save(self, state: FitState) -> None:
        """Begin to save a state, whose tensors must not change any more."""
        assert self._callbacks.save is not None, "is due"
        self._writing.result()
        frozen = replace(state, history=list(state.history), clock=list(state.clock))
        self._writing = self._writer.submit(self._callbacks.save, frozen)
        self._last = time.monotonic()


def _result(cfg: FitConfig, state: FitState, final: StateDict, scores: Floats) -> FitResult:
    """The weights to use: the best, or the last (`final`, whose validation gave `scores`) unless these diverged."""
    finite = bool(np.isfinite(scores).all())
    if finite and scores.shape == (len(state.best_scores),):
        fell = is_fall(state.best_scores, scores.tolist(), DIVERGED)
    else:  # a score that is of no images, as the classifier's, or a state of older code, without scores of images
        fell = not finite or np.mean(scores) < state.best_score - DIVERGED
    if cfg.checkpoint == "best" or fell:
        usable = final if finite else state.best
        return FitResult(state.best, state.best_step, usable, state.history, cfg.checkpoint == "last", state.clock)
    return FitResult(final, state.history[-1][0], final, state.history, clock=state.clock)


def _validate(
    module: ModuleT, callbacks: Callbacks[ModuleT], state: FitState, losses: list[Tensor], done: int, rate: float
) -> Floats:
    """Add an entry to the history of `state`, and replace its best checkpoint unless the score is lower."""
    scores = _scores(module, callbacks.validate, first=not state.history)
    score = float(np.mean(scores))
    state.history.append((done, float(torch.stack(losses).mean()), score if np.isfinite(score) else 0.0))
    state.clock.append((rate, time.time()))
    if callbacks.record:
        callbacks.record(state.history, state.clock)
    if score >= state.best_score:
        state.best, state.best_score, state.best_step = _copy(module), score, done
        state.best_scores = np.atleast_1d(scores).tolist()
    return scores


def _scores(module: ModuleT, validate: Validate[ModuleT], first: bool) -> Floats:
    """The score of a validation, or (N,) scores of its images.

    Minus infinity where the network's values are not finite; an error if it is the first.
    """
    module.eval()
    try:
        scores = np.nan_to_num(np.asarray(validate(module), float))
    except FloatingPointError:
        if first:
            raise
        return np.array(-math.inf)
    return scores if scores.size else np.zeros(())


def _copy(module: nn.Module) -> StateDict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
