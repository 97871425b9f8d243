"""Local models by name: U-Net, U-Net++ and DPT of segmentation-models-pytorch, and sks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmine.config import ModelConfig
from kmine.errors import UserError, unknown_name
from kmine.models import ARCHITECTURES
from kmine.models.base import LocalModel, decoder_channels
from kmine.models.batch_norms import folded_norms, restore_norms
from kmine.models.encoder_weights import encoder_errors, load_encoder, with_local_weights
from kmine.ops.seeding import derive_seed

ImagesFn = Callable[[], NDArray[np.uint8]]
"""Gives (N, S, S, 3) uint8 RGB training images."""


class FoldedNormsError(UserError):
    """Encoder weights with folded batch norms, without images to restore them from."""


def create_model(
    name: str = ModelConfig.name,
    *,
    encoder: str = ModelConfig.encoder,
    encoder_weights: str | None = None,
    classes: int = 2,
    seed: int = 0,
    images: NDArray[np.uint8] | None = None,
    **settings: Any,
) -> LocalModel:
    """Create a segmentation network: (B, 3, H, W) RGB in [0, 255] of any size -> (B, classes, H, W) logits.

    Args:
        name: unetpp, unet, dpt or sks.
        encoder: an encoder of segmentation-models-pytorch, or tu-NAME for one of timm; empty: mobilenet_v2
            (sks: swinv2_tiny_window8_256, dpt: tu-vit_small_patch14_dinov2).
        encoder_weights: None (random), hub (ImageNet weights, downloaded) or a local .safetensors file. The input is
            scaled as the file or its publisher states, unless `normalization` is given.
        classes: number of classes, background included.
        seed: of the random weights.
        images: (N, S, S, 3) RGB like those of training, needed for weights whose batch norms were folded only.
        settings: other fields of `kmine.config.ModelConfig`, such as encoder_depth or decoder_width.

    Raises:
        UserError: as `build_model`.

    Example:
        >>> model = create_model("unet", encoder="tu-mobilenetv3_small_050", classes=3).eval()
        >>> tuple(model(torch.zeros(1, 3, 40, 56)).shape)
        (1, 3, 40, 56)
    """
    cfg = ModelConfig(name, encoder, encoder_weights, **settings)
    return build_model(cfg, classes, seed, images=None if images is None else lambda: images)


def build_model(
    cfg: ModelConfig,
    num_classes: int,
    seed: int,
    *,
    pretrained: bool = True,
    offline: bool = False,
    images: ImagesFn | None = None,
) -> LocalModel:
    """The network of `cfg`; its random weights are drawn from `seed`, without effect on torch's CPU generator.

    `pretrained` False neither reads nor downloads encoder weights: for networks that a checkpoint is loaded into.
    `images` gives training images, (N, S, S, 3) uint8 RGB, from which folded batch norms are restored.

    Raises:
        FoldedNormsError: the batch norms of the encoder weights were folded, and there are no images.
        LostWeightsError: the file of encoder weights is missing, or not that of `encoder_sha256`.
        UserError: an unknown architecture or encoder (the nearest name is suggested); a weights file that is missing,
            damaged or of another architecture; a download that fails or is forbidden by `offline`.
    """
    if cfg.name not in ARCHITECTURES:
        raise unknown_name("model.name", cfg.name, ARCHITECTURES)
    cfg = with_local_weights((cfg if pretrained else replace(cfg, encoder_weights=None)).resolved(), offline=offline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = _build(cfg, num_classes)
    if cfg.is_pretrained and folded_norms(model.encoders()[0]):
        if images is None:
            raise FoldedNormsError(
                f"model.encoder_weights: the batch norms of {cfg.encoder_weights} were folded into the convolutions, "
                "which ruins training; pass training images, from which they are restored, as in "
                "create_model(..., images=ARRAY), or take other weights"
            )
        restore_norms(model, images())
    return model.to(memory_format=torch.channels_last)


def load_checkpoint(cfg: ModelConfig, num_classes: int, weights: Mapping[str, Tensor]) -> LocalModel:
    """The network of `cfg` with a checkpoint's weights, in eval mode; `RuntimeError` for those of another network."""
    model = build_model(cfg, num_classes, seed=0, pretrained=False)
    model.load_state_dict(weights)
    return model.eval()


def _build(cfg: ModelConfig, num_classes: int) -> LocalModel:
    if cfg.name == "sks":
        from kmine.models.sks import build_sks

        return build_sks(cfg, num_classes)
    if cfg.name == "dpt":
        from kmine.models.dpt import build_dpt

        return build_dpt(cfg, num_classes)
    import segmentation_models_pytorch as smp

    if not cfg.encoder.startswith("tu-") and cfg.encoder not in smp.encoders.get_encoder_names():
        raise unknown_name("model.encoder", cfg.encoder, smp.encoders.get_encoder_names())
    with encoder_errors(cfg, f"model.encoder_depth {cfg.encoder_depth}"):
        net = getattr(smp, ARCHITECTURES[cfg.name])(
            encoder_name=cfg.encoder,
            encoder_depth=cfg.encoder_depth,
            encoder_weights=None,
            decoder_channels=decoder_channels(cfg, [2**n for n in reversed(range(cfg.encoder_depth))]),
            classes=num_classes,
        )
    load_encoder(net.encoder, cfg.encoder_weights, cfg.encoder)
    return LocalModel(net, num_classes, 2**cfg.encoder_depth, cfg.normalization)
