"""Training of the local model: losses on labeled, pseudo-labeled and unlabeled images."""

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
from kmine.training.distributed import DeviceContext, forward, rank_slice
from kmine.training.ema import EMA
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import Callbacks, FitResult, FitState, LossFn, train_steps

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # a second and 260 MB to load; not needed without training


@dataclass(frozen=True)
class UnlabeledViews:
    """`kmine.data.batches.Views` as tensors on the device: U unlabeled images of side S."""

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
    """Unlabeled part of a training step: images for the forward pass and a loss on their logits."""

    images: Tensor
    """(M, 3, S, S) uint8; they pass the model in one batch with the labeled images."""
    loss: Callable[[Tensor], Tensor]
    """(M, K, S, S) logits -> scalar, added to the loss on the labels."""
    perturbed: Tensor | None = None
    """(M,) bool, images with feature dropout; None: none."""
    rate: float = 0.0
    """Share of the channels dropped for these."""


ConsistencyFn = Callable[[nn.Module, UnlabeledViews, int, EMA | None], ConsistencyTarget]
"""(model in eval mode, views, step, running average of the model or None) -> target; called without gradient."""


@dataclass(frozen=True)
class Consistency:
    """How a method trains on unlabeled images without pseudo masks: their views, and a loss on these."""

    signature: str
    """Of the method and its settings."""
    consistency_fn: ConsistencyFn
    strong: bool = False
    """Whether the second view gets strong augmentation; else that of the labeled images."""
    cutmix: float = 0.0
    """Probability of the second view to get a rectangle of another one."""
    ema_decay: float = 0.0
    """Decay of the running average that is validated and kept; 0: no average."""


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy + soft Dice on labeled and pseudo-labeled images.

    With `cfg.feature_perturbation`, pseudo-labeled images lose channels on the way to the decoder.
    """

    model: LocalModel
    cfg: FitConfig
    fabric: DeviceContext

    def __call__(self, net: nn.Module, batch: Batch, step: int, ema: EMA | None) -> Tensor:
        """Loss of `batch`; see `kmine.training.train_steps.LossFn`."""
        device = self.fabric.device
        images, masks, weights = to_device(batch, device)
        has_pseudo = batch.pseudo is not None and batch.pseudo.any()
        pseudo = torch.from_numpy(batch.pseudo).to(device, non_blocking=True) if has_pseudo else None
        with self.model.feature_dropout(_rank_flags(pseudo, self.fabric), self.cfg.feature_perturbation):
            logits = forward(net, images, self.fabric)
        return segmentation_loss(logits, masks, weights, self.cfg.dice_weight)


@dataclass(frozen=True)
class ConsistencyLoss:
    """Cross-entropy + soft Dice on the labeled images, plus a method's loss on views of the unlabeled ones."""

    model: LocalModel
    cfg: FitConfig
    fabric: DeviceContext
    consistency_fn: ConsistencyFn

    def __call__(self, net: nn.Module, batch: Batch, step: int, ema: EMA | None) -> Tensor:
        """Loss of `batch`; see `kmine.training.train_steps.LossFn`."""
        device = self.fabric.device
        self.model.eval()
        with torch.no_grad():
            target = self.consistency_fn(net, _views_to_device(batch.views, device), step, ema)
        self.model.train()
        images, masks, weights = to_device(batch, device)
        count = len(images)
        perturbed = None if target.perturbed is None else F.pad(target.perturbed, (count, 0))
        with self.model.feature_dropout(_rank_flags(perturbed, self.fabric), target.rate):
            logits = forward(net, torch.cat([images, target.images]), self.fabric)
        return segmentation_loss(logits[:count], masks, weights, self.cfg.dice_weight) + target.loss(logits[count:])


def fit(
    model: LocalModel,
    batches: Batches,
    cfg: FitConfig,
    *,
    fabric: Fabric,
    seed: int,
    callbacks: Callbacks[LocalModel],
    resume: FitState | None = None,
    consistency_fn: ConsistencyFn | None = None,
) -> FitResult:
    """Train `model` in place for `cfg.steps` steps. With `consistency_fn`, `batches` have views of unlabeled images.

    The other arguments are those of `kmine.training.train_steps.train_steps`.
    """
    loss_fn: LossFn[Batch] = SupervisedLoss(model, cfg, fabric)
    if consistency_fn:
        loss_fn = ConsistencyLoss(model, cfg, fabric, consistency_fn)
    return train_steps(model, batches, loss_fn, cfg, fabric=fabric, seed=seed, callbacks=callbacks, resume=resume)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8 images, (B, S, S) int64 masks, (B,) or (B, S, S) float32 weights on `device`."""
    images = torch.from_numpy(batch.images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    masks = torch.from_numpy(batch.masks).to(device, non_blocking=True).long()
    return images, masks, torch.from_numpy(batch.weights).to(device, non_blocking=True)


def _views_to_device(views: Views, device: torch.device) -> UnlabeledViews:
    weak, strong, valid, source = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (views.weak, views.strong, views.valid, views.source)
    )
    return UnlabeledViews(weak.permute(0, 3, 1, 2), strong.permute(0, 3, 1, 2), valid, source)


def _rank_flags(flags: Tensor | None, fabric: DeviceContext) -> Tensor | None:
    """Entries of (B,) `flags` for the images of this process."""
    return None if flags is None else flags[rank_slice(len(flags), fabric)]
