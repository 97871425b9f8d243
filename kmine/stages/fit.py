"""Train the local model for a given number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from kmine.config import FitConfig
from kmine.data.batches import Batch, Batches
from kmine.models.local import LocalModel
from kmine.models.loss import segmentation_loss

StateDict = dict[str, Tensor]


@dataclass
class FitState:
    """Everything a training needs to go on where it stopped."""

    step: int
    """Optimizer steps done."""
    model: StateDict
    optimizer: dict[str, StateDict]
    """AdamW's state by parameter number: step, exp_avg, exp_avg_sq."""
    best: StateDict
    best_dice: float
    best_step: int
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, mean training loss since the last entry, validation Dice)."""

    def to_tensors(self) -> tuple[StateDict, dict[str, Any]]:
        """All tensors under flat names, and what else there is as plain values."""
        flat = {f"model/{k}": v for k, v in self.model.items()} | {f"best/{k}": v for k, v in self.best.items()}
        flat |= {f"optimizer/{i}/{k}": v for i, entry in self.optimizer.items() for k, v in entry.items()}
        plain = {"step": self.step, "best_dice": self.best_dice, "best_step": self.best_step, "history": self.history}
        return flat, plain

    @classmethod
    def from_tensors(cls, tensors: StateDict, plain: dict[str, Any]) -> FitState:
        """The inverse of `to_tensors`."""
        model, best, optimizer = {}, {}, {}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            if part == "optimizer":
                number, _, key = key.partition("/")
                optimizer.setdefault(number, {})[key] = value
            else:
                (model if part == "model" else best)[key] = value
        history = [tuple(entry) for entry in plain["history"]]
        return cls(plain["step"], model, optimizer, best, plain["best_dice"], plain["best_step"], history)


@dataclass(frozen=True)
class FitResult:
    """What a training leaves behind."""

    best: StateDict
    """Weights of the validation with the highest Dice (the later one of equals)."""
    best_step: int
    final: StateDict
    """Weights after the last step."""
    history: list[tuple[int, float, float]]


def make_fabric(device: str, precision: str) -> Fabric:
    """Lightning Fabric on `device` (auto, cpu, cuda, cuda:N) in `precision` (auto, 32, bf16, 16)."""
    accelerator, _, index = device.partition(":")
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "16") if on_gpu else "32"
    plugin = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision]
    return Fabric(accelerator=accelerator, devices=[int(index)] if index else 1, precision=plugin)


def fit(
    model: LocalModel,
    batches: Batches,
    cfg: FitConfig,
    *,
    steps: int,
    fabric: Fabric,
    seed: int,
    validate: Callable[[LocalModel], float],
    resume: FitState | None = None,
    save: Callable[[FitState], None] | None = None,
    progress: Callable[[int, float, float], None] | None = None,
) -> FitResult:
    """Train `model` in place for `steps` optimizer steps.

    AdamW, linear warm-up and cosine decay, cross-entropy + soft Dice. Validates every `cfg.val_every` steps and at the
    end.

    Args:
        model: starts from the weights it has.
        batches: batch of each step.
        cfg: see `FitConfig`.
        steps: the budget.
        fabric: device and precision.
        seed: for layers that draw numbers (dropout); with the step it fixes them.
        validate: validation Dice of the model; NaN counts as 0.
        resume: go on from here; the result equals that of an undisturbed training.
        save: called with the state after every validation but the last.
        progress: called every tenth step with (step, loss, last validation Dice).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    wrapped, optimizer = fabric.setup(model, optimizer)
    state = resume or FitState(0, {}, {}, _copy(model), -math.inf, 0)
    if resume:
        model.load_state_dict(resume.model)
        _load_optimizer(optimizer, resume.optimizer)
    losses: list[Tensor] = []
    last_dice = state.history[-1][2] if state.history else math.nan
    for step, batch in enumerate(batches.stream(state.step, steps, cfg.num_workers), start=state.step):
        torch.manual_seed((seed + step) % 2**63)
        model.train()
        losses.append(_step(wrapped, optimizer, fabric, batch, cfg, _learning_rate(step, steps, cfg)))
        done = step + 1
        if progress and (done % 10 == 0 or done == steps):  # reading the loss waits for the device
            progress(done, float(losses[-1]), last_dice)
        if done % cfg.val_every == 0 or done == steps:
            last_dice = _validated(model, validate, state, done, losses)
            losses = []
            if save and done < steps:
                state.step, state.model, state.optimizer = done, _copy(model), _optimizer_state(optimizer)
                save(state)
    return FitResult(state.best, state.best_step, _copy(model), state.history)


def _step(
    wrapped: torch.nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric, batch: Batch, cfg: FitConfig, lr: float
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = lr
    images, masks, weights = to_device(batch, fabric.device)
    loss = segmentation_loss(wrapped(images), masks, weights, cfg.dice_weight)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _validated(
    model: LocalModel, validate: Callable[[LocalModel], float], state: FitState, done: int, losses: list[Tensor]
) -> float:
    model.eval()
    dice = float(np.nan_to_num(validate(model)))
    state.history.append((done, float(torch.stack(losses).mean()), dice))
    if dice >= state.best_dice:
        state.best, state.best_dice, state.best_step = _copy(model), dice, done
    return dice


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8, (B, S, S) int64, (B,) float32 on `device`."""
    images = torch.from_numpy(batch.images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    masks = torch.from_numpy(batch.masks).to(device, non_blocking=True).long()
    return images, masks, torch.from_numpy(batch.weights).to(device, non_blocking=True)


def _learning_rate(step: int, steps: int, cfg: FitConfig) -> float:
    warmup = cfg.warmup * steps
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _copy(model: LocalModel) -> StateDict:
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, StateDict]:
    entries = optimizer.state_dict()["state"]
    return {str(i): {k: torch.as_tensor(v).cpu().clone() for k, v in entry.items()} for i, entry in entries.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, StateDict]) -> None:
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(i): entry for i, entry in state.items()}, "param_groups": groups})
