"""Train the local model for a given number of optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FitConfig
from kmine.data.batches import Batch, Batches, Views
from kmine.models.base import LocalModel
from kmine.training.distributed import forward, rank_slice
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import (
    EMA,
    FitResult,
    FitState,
    train_steps,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # a second to load, and 260 MB: where nothing is trained, it stays away


@dataclass(frozen=True)
class UnlabeledViews:
    """`Views` as tensors on the device; see there."""

    weak: Tensor
    """(U, 3, S, S) uint8."""
    strong: Tensor
    """(U, 3, S, S) uint8."""
    valid: Tensor
    """(U, S, S) bool."""
    source: Tensor
    """(U, S, S) int64."""


@dataclass(frozen=True)
class ConsistencyTarget:
    """What a model in training is asked about the unlabeled images of a step, beside the labeled ones."""

    images: Tensor
    """(M, 3, S, S) uint8; they pass the model in one batch with the labeled ones."""
    loss: Callable[[Tensor], Tensor]
    """From the (M, K, S, S) logits to a scalar that is added to the loss on the labels."""
    perturbed: Tensor | None = None
    """(M,) bool, which of them lose channels on the way to the decoder; None: none."""
    rate: float = 0.0
    """Share of the channels that these lose."""


ConsistencyFn = Callable[[nn.Module, UnlabeledViews, int, EMA | None], ConsistencyTarget]
"""From (model, put to eval, views, step, running average of the model) to what is asked; no gradient passes here."""


@dataclass(frozen=True)
class Consistency:
    """What a method makes of unlabeled images without any mask of theirs: how they are shown, what is asked."""

    signature: str
    """Of the method and its settings."""
    consistency_fn: ConsistencyFn
    strong: bool = False
    """The changed view is a strong one; else as the labeled images are."""
    cutmix: float = 0.0
    """Probability that it gets a rectangle of another one."""
    ema_decay: float = 0.0
    """Of the running average that is validated and kept; 0: none is."""


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
    consistency_fn: ConsistencyFn | None = None,
) -> FitResult:
    """Train `model` in place for `steps` optimizer steps on cross-entropy + soft Dice.

    With `cfg.feature_perturbation`, pseudo-labeled images lose channels on the way to the decoder.

    The terms are those of `kmine.training.train_steps.train_steps`; its score is validation Dice.

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
        consistency_fn: what the model is asked about the batches' unlabeled images; without it they are not looked at.
    """

    def local_flags(flags: Tensor | None) -> Tensor | None:
        return None if flags is None else flags[rank_slice(len(flags), fabric)]

    def loss_fn(net: nn.Module, batch: Batch) -> Tensor:
        images, masks, weights = to_device(batch, fabric.device)
        has_pseudo = batch.pseudo is not None and batch.pseudo.any()
        pseudo = torch.from_numpy(batch.pseudo).to(fabric.device, non_blocking=True) if has_pseudo else None
        with model.feature_dropout(local_flags(pseudo), cfg.feature_perturbation):
            logits = forward(net, images, fabric)
        return segmentation_loss(logits, masks, weights, cfg.dice_weight)

    @torch.no_grad()
    def prepare(net: nn.Module, batch: Batch, step: int, ema: EMA | None) -> tuple[Batch, ConsistencyTarget]:
        return batch, consistency_fn(net, _views_to_device(batch.views, fabric.device), step, ema)

    def loss_with_unlabeled(net: nn.Module, prepared: tuple[Batch, ConsistencyTarget]) -> Tensor:
        batch, target = prepared
        images, masks, weights = to_device(batch, fabric.device)
        count = len(images)
        perturbed = None if target.perturbed is None else F.pad(target.perturbed, (count, 0))
        with model.feature_dropout(local_flags(perturbed), target.rate):
            logits = forward(net, torch.cat([images, target.images]), fabric)
        return segmentation_loss(logits[:count], masks, weights, cfg.dice_weight) + target.loss(logits[count:])

    return train_steps(
        model,
        batches,
        loss_with_unlabeled if consistency_fn else loss_fn,
        cfg,
        steps=steps,
        fabric=fabric,
        seed=seed,
        validate=validate,
        resume=resume,
        save=save,
        progress=progress,
        prepare=prepare if consistency_fn else None,
    )


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8, (B, S, S) int64, (B,) or (B, S, S) float32 on `device`."""
    images = torch.from_numpy(batch.images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    masks = torch.from_numpy(batch.masks).to(device, non_blocking=True).long()
    return images, masks, torch.from_numpy(batch.weights).to(device, non_blocking=True)


def _views_to_device(views: Views, device: torch.device) -> UnlabeledViews:
    weak, strong, valid, source = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (views.weak, views.strong, views.valid, views.source)
    )
    return UnlabeledViews(weak.permute(0, 3, 1, 2), strong.permute(0, 3, 1, 2), valid, source)


__all__ = [
    "ConsistencyFn",
    "ConsistencyTarget",
    "Consistency",
    "FitResult",
    "FitState",
    "UnlabeledViews",
    "fit",
    "to_device",
]
