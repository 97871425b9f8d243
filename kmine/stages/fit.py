"""Train the local model for a given number of optimizer steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from kmine.config import FitConfig
from kmine.data.batches import Batch, Batches
from kmine.models.local import LocalModel
from kmine.models.loss import segmentation_loss
from kmine.models.training import FitResult, FitState, train_steps


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
    """Train `model` in place for `steps` optimizer steps on cross-entropy + soft Dice.

    With `cfg.feature_perturbation`, pseudo-labeled images lose channels on the way to the decoder.

    The terms are those of `kmine.models.training.train_steps`; its score is validation Dice.

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

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        images, masks, weights = to_device(batch, fabric.device)
        mined = batch.pseudo is not None and batch.pseudo.any()
        pseudo = torch.from_numpy(batch.pseudo).to(fabric.device, non_blocking=True) if mined else None
        with model.perturbing(pseudo, cfg.feature_perturbation):
            logits = net(images)
        return segmentation_loss(logits, masks, weights, cfg.dice_weight)

    return train_steps(
        model,
        batches,
        loss_of,
        cfg,
        steps=steps,
        fabric=fabric,
        seed=seed,
        validate=validate,
        resume=resume,
        save=save,
        progress=progress,
    )


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) uint8, (B, S, S) int64, (B,) or (B, S, S) float32 on `device`."""
    images = torch.from_numpy(batch.images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    masks = torch.from_numpy(batch.masks).to(device, non_blocking=True).long()
    return images, masks, torch.from_numpy(batch.weights).to(device, non_blocking=True)


__all__ = ["FitResult", "FitState", "fit", "make_fabric", "to_device"]
