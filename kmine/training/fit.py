"""Training of the local model: losses on labeled, pseudo-labeled and unlabeled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FitConfig
from kmine.data.batches import Batch, Batches, Views
from kmine.models.base import LocalModel
from kmine.training.distributed import DeviceContext, Fabric, forward, rank_slice
from kmine.training.ema import EMA
from kmine.training.inference import image_tensor
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import Callbacks, FitResult, FitState, train_steps


@dataclass(frozen=True)
class UnlabeledViews:
    """`kmine.data.batches.Views` as tensors on the device: U unlabeled images of side S."""

    weak: Tensor
    """(U, 3, S, S) uint8."""
    strong: Tensor
    """(V*U, 3, S, S) uint8, V strong views."""
    valid: Tensor
    """(U, S, S) bool."""
    source: Tensor
    """(V*U, S, S) int64."""


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
    num_strong: int = 1
    """Number of these views."""
    cutmix: float = 0.0
    """Probability of each of these views to get a rectangle of another one."""
    ema_decay: float = 0.0
    """Decay of the running average that is validated and kept; 0: no average."""


@dataclass(frozen=True)
class _Loss:
    """Cross-entropy + soft Dice on labels and pseudo masks; with `consistency_fn` also its loss on unlabeled images.

    With `cfg.feature_perturbation`, pseudo-labeled images lose channels on the way to the decoder.
    """

    model: LocalModel
    cfg: FitConfig
    fabric: DeviceContext
    consistency_fn: ConsistencyFn | None
    mix: Callable[[Batch, int], Batch] | None = None  # of batches of which each process has its slots only

    def __call__(self, net: nn.Module, batch: Batch, step: int, ema: EMA | None) -> Tensor:
        """Loss of `batch`; see `kmine.training.train_steps.LossFn`."""
        if self.mix:
            parts = [_tensor(array, self.fabric.device) for array in (batch.images, batch.masks)]
            for part in parts:
                torch.distributed.all_reduce(part)  # each slot is 0 in all processes but one
            images, masks = (part.cpu().numpy() for part in parts)
            batch = self.mix(replace(batch, images=images, masks=masks), step)
        images, masks, weights = to_device(batch, self.fabric.device)
        if self.consistency_fn is None:
            has_pseudo = batch.pseudo is not None and batch.pseudo.any()
            pseudo = _tensor(batch.pseudo, self.fabric.device) if has_pseudo else None
            logits = self._logits(net, images, pseudo, self.cfg.feature_perturbation)
            return self._on_masks(logits, masks, weights)
        self.model.eval()
        with torch.no_grad():
            target = self.consistency_fn(net, _views_to_device(batch.views, self.fabric.device), step, ema)
        self.model.train()
        count = len(images)
        perturbed = None if target.perturbed is None else F.pad(target.perturbed, (count, 0))
        logits = self._logits(net, torch.cat([images, target.images]), perturbed, target.rate)
        return self._on_masks(logits[:count], masks, weights) + target.loss(logits[count:])

    def _on_masks(self, logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
        cfg = self.cfg
        return segmentation_loss(logits, masks, weights, cfg.dice_weight, by_image=cfg.dice != "batch")

    def _logits(self, net: nn.Module, images: Tensor, perturbed: Tensor | None, rate: float) -> Tensor:
        """Logits of `images`; those with a flag in `perturbed`, (B,) bool, have feature dropout."""
        local_flags = None if perturbed is None else perturbed[rank_slice(len(perturbed), self.fabric)]
        with self.model.feature_dropout(local_flags, rate):
            return forward(net, images, self.fabric)


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
    mix = None
    if isinstance(batches, Batches) and consistency_fn is None and 1 < fabric.world_size <= batches.plan.batch_size:
        batches.own, mix = partial(rank_slice, fabric=fabric), batches.mix
    loss_fn = _Loss(model, cfg, fabric, consistency_fn, mix)
    return train_steps(model, batches, loss_fn, cfg, fabric=fabric, seed=seed, callbacks=callbacks, resume=resume)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8 images, (B, S, S) int64 masks, (B,) or (B, S, S) float32 weights on `device`."""
    masks, weights = _tensor(batch.masks, device).long(), _tensor(batch.weights, device)
    return image_tensor(batch.images, device), masks, weights


def _views_to_device(views: Views, device: torch.device) -> UnlabeledViews:
    weak, strong = (image_tensor(images, device) for images in (views.weak, views.strong))
    return UnlabeledViews(weak, strong, _tensor(views.valid, device), _tensor(views.source, device))


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
