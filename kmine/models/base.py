"""The local model: a network with the scaling and padding of its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    def caching_features(self, *, augmented: bool) -> Iterator[None]:
        """A block in which a model may keep what depends on the image alone; this one has nothing of that kind.

        `augmented` says that training images differ at every step.
        """
        yield

    @contextmanager
    def feature_dropout(self, images: Tensor | None, rate: float) -> Iterator[None]:
        """A block in which a model in training drops channels of what its decoder gets, for some images of a batch.

        The feature perturbation of UniMatch (arXiv 2208.09910), as we read it, in one stream instead of a second one.

        Args:
            images: (B,) bool, for which images of the batch; None: none.
            rate: probability of each channel of each level to be dropped; the others grow by 1 / (1 - rate).
        """

        def drop(features: Any) -> Any:
            if not isinstance(features, Tensor):
                return type(features)(drop(level) for level in features)
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
