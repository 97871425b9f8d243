"""Settings of small local models, and weights away from their initial values."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from kmine.config import ModelConfig
from kmine.models.base import LocalModel


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


def smooth_images(count: int = 24, size: int = 64, seed: int = 0) -> np.ndarray:
    """(N, S, S, 3) uint8 of coloured blobs and noise, with statistics that differ between images."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2)
    return np.clip(coarse * rng.uniform(0.3, 1, (count, 1, 1, 3)) + rng.normal(0, 20, coarse.shape), 0, 255).astype(
        "u1"
    )


def make_healthy(model: LocalModel, images: np.ndarray, seed: int = 3) -> nn.Module:
    """The encoder of `model` with norms as after training: statistics of their inputs, any weights and biases."""
    encoder, generator = model.encoders()[0], torch.Generator().manual_seed(seed)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    x = model.prepare(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=generator))
            norm.momentum = 1.0
        encoder.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return encoder.eval()


def fold_norms(encoder: nn.Module, x: torch.Tensor) -> None:
    """Fold every norm into the convolution whose output it takes, and keep the names, as deployment files do."""
    outputs, pairs = [], []
    hooks = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda m, _, out: outputs.append((m, out))))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, args: pairs.append((next(c for c, out in outputs if out is args[0]), m))
                )
            )
    with torch.no_grad():
        encoder.eval()(x)
        for hook in hooks:
            hook.remove()
        for conv, norm in pairs:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight *= scale[:, None, None, None]
            norm.bias -= norm.running_mean * scale
            norm.weight.fill_(1)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)


def save_encoder(path, encoder: nn.Module, **metadata: str) -> None:
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, path, metadata or None)
