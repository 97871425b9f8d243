"""The local model: a network together with the scaling and padding of its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import ModelConfig
from kmine.config.model import SCALINGS


def decoder_channels(cfg: ModelConfig, strides: Sequence[int]) -> tuple[int, ...]:
    """Channels of the decoder's output at each of `strides`, deepest first, equally for all models.

    `cfg.decoder_width` channels at stride 1, doubled with each stride; or the older rule of `cfg.decoder_channels`.
    """
    if cfg.decoder_channels is None:
        return tuple(cfg.decoder_width * stride for stride in strides)
    return tuple(max(8, cfg.decoder_channels >> level) for level in range(len(strides)))


class LocalModel(nn.Module):
    """A segmentation network for unscaled images of any size.

    `forward` takes (B, 3, H, W) RGB in [0, 255], uint8 or float, and returns (B, K, H, W) float logits. Sides that are
    no multiple of the network's stride are padded by repeating the border; the logits are cropped again.

    Args:
        net: (B, 3, H, W) scaled images -> (B, K, H, W) logits; its `decoder` takes the features of all levels.
        num_classes: K, background included.
        stride: sides of the network's input are multiples of it.
        normalization: a name of `kmine.config.model.SCALINGS`, such as half (x / 127.5 - 1).
    """

    patch: int | None = None
    """Side of the squares in which larger images are predicted in eval mode; these overlap by half, and their logits
    are averaged with Gaussian weights."""

    def __init__(self, net: nn.Module, num_classes: int, stride: int, normalization: str) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.stride = stride
        self.lost_weights: Exception | None = None
        """Why the initial weights are not there."""
        self.set_scaling(normalization)

    def require_weights(self) -> None:
        """Raise `lost_weights`, if any: before a training that begins with the initial weights."""
        if self.lost_weights is not None:
            raise self.lost_weights

    def set_scaling(self, normalization: str) -> None:
        """Scale the input as `normalization` says, as in the class."""
        for name, values in zip(("mean", "std"), SCALINGS[normalization], strict=True):
            scaled = torch.tensor([255 * value for value in values])
            self.register_buffer(name, scaled.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        height, width = images.shape[-2:]
        if self.patch and not self.training and max(height, width) > self.patch:
            from monai.inferers import sliding_window_inference

            options = {"sw_batch_size": 8, "overlap": 0.5, "mode": "gaussian"}
            return sliding_window_inference(images.float(), (self.patch,) * 2, predictor=self.forward, **options)
        return self.net(self.prepare(images))[..., :height, :width]

    def with_patch(self, side: int | None) -> LocalModel:
        """This model, with `patch`."""
        self.patch = side
        return self

    def encoders(self) -> list[nn.Module]:
        """The parts that may begin with pretrained weights."""
        return [self.net.encoder] if hasattr(self.net, "encoder") else []

    def prepare(self, images: Tensor) -> Tensor:
        """Input of the network: images scaled, and padded at the bottom and on the right."""
        height, width = images.shape[-2:]
        x = (images.float() - self.mean) / self.std
        pad = (0, -width % self.stride, 0, -height % self.stride)
        if any(pad):
            x = F.pad(x, pad, mode="replicate")
        # channels_last: 1.4 to 2.8 times the steps per second on CPUs; also the layout of tensor cores
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def pooled_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): means over the image of the deepest features that the decoder takes."""
        found: list[Tensor] = []
        hook = self.net.decoder.register_forward_pre_hook(lambda decoder, inputs: found.append(inputs[0][-1]))
        try:
            self.net(self.prepare(images))
        finally:
            hook.remove()
        return found[0].float().mean(dim=(2, 3))

    @contextmanager
    def caching_features(self, *, augmented: bool) -> Iterator[None]:
        """Cache features of unchanged images within the block (see `SksModel`); this model has none to cache."""
        yield

    @contextmanager
    def feature_dropout(self, images: Tensor | None, rate: float) -> Iterator[None]:
        """Within the block, a model in train mode drops channels of its decoder's input for `images`, (B,) bool.

        The feature perturbation of UniMatch (arXiv 2208.09910) in our reading, without a second stream. `rate` is the
        probability of each channel of each level to be dropped; the others are scaled by 1 / (1 - rate).
        """

        def drop(features: Any) -> Any:
            if isinstance(features, list | tuple):
                return type(features)(drop(level) for level in features)
            if features is None or features.ndim != 4:  # tokens of a transformer that belong to no place
                return features
            kept = F.dropout2d(features.new_ones(*features.shape[:2], 1, 1), rate)
            return features * torch.where(images[:, None, None, None], kept, 1)

        def drop_channels(decoder: nn.Module, features: tuple[Any, ...]) -> Any:
            return drop(features) if decoder.training else None

        if not rate or images is None:
            yield
            return
        hook = self.net.decoder.register_forward_pre_hook(drop_channels)
        try:
            yield
        finally:
            hook.remove()
