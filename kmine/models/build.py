"""Local models by name: U-Net and U-Net++ of segmentation-models-pytorch; scaling and padding inside the model."""

from __future__ import annotations

import torch

from kmine.config import ModelConfig
from kmine.errors import unknown_name
from kmine.models import ARCHITECTURES
from kmine.models.base import LocalModel
from kmine.models.encoder_weights import encoder_errors, load_encoder
from kmine.seeding import derive_seed


def build_model(cfg: ModelConfig, num_classes: int, seed: int, *, offline: bool = False) -> LocalModel:
    """The network that `cfg` names, its random parts drawn from `seed`.

    Raises:
        UserError: an unknown architecture or encoder (the nearest is suggested), a weights file that is missing,
            damaged or of another architecture, a download that fails or is forbidden by `offline`.
    """
    if cfg.name not in ARCHITECTURES:
        raise unknown_name("model.name", cfg.name, ARCHITECTURES)
    cfg = cfg.resolved()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = _build(cfg, num_classes, offline)
    return model.to(memory_format=torch.channels_last)


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
            decoder_channels=tuple(max(8, cfg.decoder_channels >> i) for i in range(cfg.encoder_depth)),
            classes=num_classes,
        )
    load_encoder(net.encoder, cfg.encoder_weights, cfg.encoder)
    return LocalModel(net, num_classes, 2**cfg.encoder_depth, cfg.normalization)
