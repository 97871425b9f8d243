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
from kmine.training.distributed import forward, slice_of
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import (
    Average,
    FitResult,
    FitState,
    train_steps,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # a second to load, and 260 MB: where nothing is trained, it stays away


@dataclass(frozen=True)
class SeenTwice:
    """`Views` as tensors on the device; see there."""

    weak: Tensor
    """(U, 3, S, S) uint8."""
    strong: Tensor
    """(U, 3, S, S) uint8."""
    known: Tensor
    """(U, S, S) bool."""
    source: Tensor
    """(U, S, S) int64."""


@dataclass(frozen=True)
class Asked:
    """What a model in training is asked about the unlabeled images of a step, beside the labeled ones."""

    images: Tensor
    """(M, 3, S, S) uint8; they pass the model in one batch with the labeled ones."""
    loss: Callable[[Tensor], Tensor]
    """From the (M, K, S, S) logits to a scalar that is added to the loss on the labels."""
    perturbed: Tensor | None = None
    """(M,) bool, which of them lose channels on the way to the decoder; None: none."""
    rate: float = 0.0
    """Share of the channels that these lose."""


Ask = Callable[[nn.Module, SeenTwice, int, Average | None], Asked]
"""From (model, put to eval, views, step, running average of the model) to what is asked; no gradient passes here."""


@dataclass(frozen=True)
class Consistency:
    """What a method makes of unlabeled images without any mask of theirs: how they are shown, what is asked."""

    signature: str
    """Of the method and its settings."""
    ask: Ask
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
    ask: Ask | None = None,
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
        ask: what the model is asked about the batches' unlabeled images; without it they are not looked at.
    """

    def own(flags: Tensor | None) -> Tensor | None:
        return None if flags is None else flags[slice_of(len(flags), fabric)]

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        images, masks, weights = to_device(batch, fabric.device)
        mined = batch.pseudo is not None and batch.pseudo.any()
        pseudo = torch.from_numpy(batch.pseudo).to(fabric.device, non_blocking=True) if mined else None
        with model.perturbing(own(pseudo), cfg.feature_perturbation):
            logits = forward(net, images, fabric)
        return segmentation_loss(logits, masks, weights, cfg.dice_weight)

    @torch.no_grad()
    def prepare(net: nn.Module, batch: Batch, step: int, average: Average | None) -> tuple[Batch, Asked]:
        return batch, ask(net, _views_to_device(batch.views, fabric.device), step, average)

    def loss_with_unlabeled(net: nn.Module, given: tuple[Batch, Asked]) -> Tensor:
        batch, asked = given
        images, masks, weights = to_device(batch, fabric.device)
        count = len(images)
        perturbed = None if asked.perturbed is None else F.pad(asked.perturbed, (count, 0))
        with model.perturbing(own(perturbed), asked.rate):
            logits = forward(net, torch.cat([images, asked.images]), fabric)
        return segmentation_loss(logits[:count], masks, weights, cfg.dice_weight) + asked.loss(logits[count:])

    return train_steps(
        model,
        batches,
        loss_with_unlabeled if ask else loss_of,
        cfg,
        steps=steps,
        fabric=fabric,
        seed=seed,
        validate=validate,
        resume=resume,
        save=save,
        progress=progress,
        prepare=prepare if ask else None,
    )


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8, (B, S, S) int64, (B,) or (B, S, S) float32 on `device`."""
    images = torch.from_numpy(batch.images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    masks = torch.from_numpy(batch.masks).to(device, non_blocking=True).long()
    return images, masks, torch.from_numpy(batch.weights).to(device, non_blocking=True)


def _views_to_device(views: Views, device: torch.device) -> SeenTwice:
    weak, strong, known, source = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (views.weak, views.strong, views.valid, views.source)
    )
    return SeenTwice(weak.permute(0, 3, 1, 2), strong.permute(0, 3, 1, 2), known, source)


__all__ = ["Ask", "Asked", "Consistency", "FitResult", "FitState", "SeenTwice", "fit", "to_device"]
