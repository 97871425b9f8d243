"""Exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a module's weights and buffers, kept beside the module in training.

    Step n (0, 1, ...) keeps `min(decay, (1 + n) / (10 + n))` of the average. The decay is warmed up, so the random
    initial weights are forgotten quickly. Integer buffers (batch norm's counter) are copied.
    """

    def __init__(self, module: nn.Module, decay: float, state: dict[str, Tensor] | None = None) -> None:
        """Start from the current weights of `module`, or from a saved average `state`."""
        self.module = module
        self.decay = decay
        self._live = module.state_dict()
        """Views of the module's own tensors: they follow the training."""
        self._mean = {k: v.detach().clone() for k, v in self._live.items()}
        for k, v in (state or {}).items():
            self._mean[k].copy_(v)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the module's weights after `step` (0, 1, ...)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for mean, now in zip(self._mean.values(), self._live.values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights within the block, and its own afterwards."""
        own = {k: v.detach().clone() for k, v in self._live.items()}
        self.module.load_state_dict(self._mean)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """A copy of the average, on the CPU."""
        return {k: v.cpu().clone() for k, v in self._mean.items()}
