"""Batch norm over the slices of a batch that several processes run."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class AllReduce(torch.autograd.Function):
    """Sum over all processes, forward and backward.

    Equals `torch.distributed.nn.functional.all_reduce`, which torch 2.14 deprecates in favor of a private module.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    backward = forward


def sync_batchnorm(module: nn.Module, device: torch.device) -> None:
    """Make the batch norms of `module` use statistics of all processes, in place; on a GPU they become torch's own."""
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm

    if device.type == "cuda":
        convert_sync_batchnorm(module)
        return
    for layer in module.modules():
        # Changing the class keeps weights, buffers, their names and references to the layer.
        if type(layer) is BatchNormAct2d:
            layer.__class__ = _sync_batchnorm_act(BatchNormAct2d)
        elif type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNormCPU


class SyncBatchNormCPU(nn.BatchNorm2d):
    """Batch norm over the slices of all processes; torch's SyncBatchNorm does not run on a CPU."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(B, C, H, W) -> the same shape."""
        return _normalized(self, input) if self.training else super().forward(input)


@cache
def _sync_batchnorm_act(base: type[nn.BatchNorm2d]) -> type[nn.BatchNorm2d]:
    """`SyncBatchNormCPU` for timm's batch norm, which includes an activation."""

    class SyncBatchNormActCPU(base):  # type: ignore[misc, valid-type]  # timm is loaded only where it is used
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(_normalized(self, x))) if self.training else super().forward(x)

    return SyncBatchNormActCPU


def _normalized(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """(B, C, H, W) normalized by mean and variance over all processes; updates the running statistics.

    Computed in float32 or wider. A second reduction sums squared deviations from the shared mean, because
    E[x²] - E[x]² suffers from cancellation if the mean is large compared with the deviation.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_tensor([wide.numel() / wide.shape[1]])
    sums = AllReduce.apply(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = wide - mean[:, None, None]
    var = AllReduce.apply(centered.square().sum(dim=(0, 2, 3))) / count
    with torch.no_grad():
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * count / (count - 1).clamp_min(1), layer.momentum)
    scale = (var + layer.eps).rsqrt() * layer.weight
    return (centered * scale[:, None, None] + layer.bias[:, None, None]).to(x.dtype)
