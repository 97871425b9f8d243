"""Local models by name: U-Net and U-Net++ of segmentation-models-pytorch; scaling and padding inside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import ModelConfig
from kmine.models import ARCHITECTURES
from kmine.models.encoder_weights import building, load_encoder
from kmine.records import derive_seed, unknown_name

_SCALING = {  # mean and deviation on [0, 255]
    "half": ((127.5,) * 3, (127.5,) * 3),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


class LocalModel(nn.Module):
    """A segmentation network that takes plain images of any size.

    `forward` takes (B, 3, H, W) RGB in [0, 255], uint8 or float, and returns (B, K, H, W) float logits. Sides that do
    not divide by the network's stride are padded by repeating the border and cropped again.
    """

    def __init__(self, net: nn.Module, num_classes: int, stride: int, normalization: str) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.stride = stride
        mean, std = _SCALING[normalization]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        height, width = images.shape[-2:]
        return self.net(self.prepare(images))[..., :height, :width]

    def prepare(self, images: Tensor) -> Tensor:
        """The images as the network takes them: scaled, padded below and on the right."""
        height, width = images.shape[-2:]
        x = (images.float() - self.mean) / self.std
        pad = (0, -width % self.stride, 0, -height % self.stride)
        if any(pad):
            x = F.pad(x, pad, mode="replicate")
        # channels_last: 1.4 to 2.8 times the steps per second on CPUs, and what tensor cores want
        return x.contiguous(memory_format=torch.channels_last)

    @contextmanager
    def remembering(self, *, augmented: bool) -> Iterator[None]:
        """A block in which a model may keep what depends on the image alone; this one has nothing of that kind.

        `augmented` says that training images differ at every step.
        """
        yield

    @contextmanager
    def perturbing(self, images: Tensor | None, rate: float) -> Iterator[None]:
        """A block in which a model in training drops channels of what its decoder gets, for some images of a batch.

        The feature perturbation of UniMatch (arXiv 2208.09910), as we read it, in one stream instead of a second one.

        Args:
            images: (B,) bool, for which images of the batch; None: none.
            rate: probability of each channel of each level to be dropped; the others grow by 1 / (1 - rate).
        """

        def drop(given: Any) -> Any:
            if not isinstance(given, Tensor):
                return type(given)(drop(one) for one in given)
            kept = F.dropout2d(given.new_ones(*given.shape[:2], 1, 1), rate)
            return given * torch.where(images[:, None, None, None], kept, 1)

        def before(decoder: nn.Module, features: tuple[Any, ...]) -> Any:
            return drop(features) if decoder.training else None

        if not rate or images is None:
            yield
            return
        hook = self.net.decoder.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()


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
    with building(cfg, f"model.encoder_depth {cfg.encoder_depth}", offline):
        net = getattr(smp, ARCHITECTURES[cfg.name])(
            encoder_name=cfg.encoder,
            encoder_depth=cfg.encoder_depth,
            encoder_weights="imagenet" if cfg.encoder_weights == "hub" else None,
            decoder_channels=tuple(max(8, cfg.decoder_channels >> i) for i in range(cfg.encoder_depth)),
            classes=num_classes,
        )
    load_encoder(net.encoder, cfg.encoder_weights, cfg.encoder)
    return LocalModel(net, num_classes, 2**cfg.encoder_depth, cfg.normalization)
