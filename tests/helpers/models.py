"""Settings of small local models, and weights away from their initial values."""

from __future__ import annotations

import torch
from torch import nn

from kmine.config import ModelConfig


def small(**settings: object) -> ModelConfig:
    """U-Net++ (or another `name`) on a small encoder."""
    return ModelConfig(**{"encoder": "tu-mobilenetv3_small_050", "decoder_channels": 16, **settings})


def small_sks(**settings: object) -> ModelConfig:
    """sks with three levels on a small encoder."""
    return small(
        **{"name": "sks", "encoder": "mobilenetv3_small_050", "levels": 3, "decoder": "unet", "veto": False, **settings}
    )


def scramble(module: nn.Module, seed: int = 11) -> None:
    """Add noise to all weights: a test must not pass because some are zero or one initially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
