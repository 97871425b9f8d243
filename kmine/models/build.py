"""Local models by name: U-Net and U-Net++ of segmentation-models-pytorch, and sks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kmine.config import ModelConfig
from kmine.errors import unknown_name
from kmine.models import ARCHITECTURES
from kmine.models.base import LocalModel, decoder_channels
from kmine.models.encoder_weights import encoder_errors, load_encoder
from kmine.seeding import derive_seed


def create_model(
    name: str = ModelConfig.name,
    *,
    encoder: str = ModelConfig.encoder,
    encoder_weights: str | None = ModelConfig.encoder_weights,
    classes: int = 2,
    seed: int = 0,
    **settings: Any,
) -> LocalModel:
    """Create a segmentation network: (B, 3, H, W) RGB in [0, 255] of any size -> (B, classes, H, W) logits.

    Args:
        name: unetpp, unet or sks.
        encoder: an encoder of segmentation-models-pytorch, or tu-NAME for one of timm; empty: mobilenet_v2
            (sks: swinv2_tiny_window8_256).
        encoder_weights: None (random), hub (ImageNet weights, downloaded) or a local .safetensors file.
        classes: number of classes, background included.
        seed: of the random weights.
        settings: other fields of `kmine.config.ModelConfig`, such as encoder_depth or decoder_width.

    Raises:
        UserError: as `build_model`.

    Example:
        >>> model = create_model("unet", encoder="tu-mobilenetv3_small_050", classes=3).eval()
        >>> tuple(model(torch.zeros(1, 3, 40, 56)).shape)
        (1, 3, 40, 56)
    """
    return build_model(ModelConfig(name, encoder, encoder_weights, **settings), classes, seed)


def build_model(
    cfg: ModelConfig, num_classes: int, seed: int, *, pretrained: bool = True, offline: bool = False
) -> LocalModel:
    """The network of `cfg`; its random weights are drawn from `seed`, without effect on torch's CPU generator.

    `pretrained` False neither reads nor downloads encoder weights: for networks that a checkpoint is loaded into.

    Raises:
        UserError: an unknown architecture or encoder (the nearest name is suggested); a weights file that is missing,
            damaged or of another architecture; a download that fails or is forbidden by `offline`.
    """
    if cfg.name not in ARCHITECTURES:
        raise unknown_name("model.name", cfg.name, ARCHITECTURES)
    cfg = (cfg if pretrained else replace(cfg, encoder_weights=None)).resolved()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = _build(cfg, num_classes, offline)
    return model.to(memory_format=torch.channels_last)


def load_checkpoint(cfg: ModelConfig, num_classes: int, weights: Mapping[str, Tensor]) -> LocalModel:
    """The network of `cfg` with a checkpoint's weights, in eval mode; `RuntimeError` for those of another network."""
    model = build_model(cfg, num_classes, seed=0, pretrained=False)
    model.load_state_dict(weights)
    return model.eval()


def _build(cfg: ModelConfig, num_classes: int, offline: bool) -> LocalModel:
    if cfg.name == "sks":
        from kmine.models.sks import build_sks

        return build_sks(cfg, num_classes, offline=offline)
    import segmentation_models_pytorch as smp

    if not cfg.encoder.startswith("tu-") and cfg.encoder not in smp.encoders.get_encoder_names():
        raise unknown_name("model.encoder", cfg.encoder, smp.encoders.get_encoder_names())
    with encoder_errors(cfg, f"model.encoder_depth {cfg.encoder_depth}", offline):
        net = getattr(smp, ARCHITECTURES[cfg.name])(
            encoder_name=cfg.encoder,
            encoder_depth=cfg.encoder_depth,
            encoder_weights="imagenet" if cfg.encoder_weights == "hub" else None,
            decoder_channels=decoder_channels(cfg, [2**n for n in reversed(range(cfg.encoder_depth))]),
            classes=num_classes,
        )
    load_encoder(net.encoder, cfg.encoder_weights, cfg.encoder)
    return LocalModel(net, num_classes, 2**cfg.encoder_depth, cfg.normalization)
