"""Batch norm over processes equals batch norm over the whole batch; two threads stand for two processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kmine.models.sync_batchnorm import sync_batchnorm


class Exchange:
    """`torch.distributed.all_reduce` between two threads of this process."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.parts: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> None:
        """Sum `x` (...) of both threads in place."""
        self.parts[threading.get_ident()] = x.clone()
        self.barrier.wait()
        a, b = self.parts.values()
        x.copy_(a + b)
        self.barrier.wait()


def batch_norm_step(layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of (B, C, H, W) and the gradients of its sum weighted by `weight`: of x, the layer's weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), (x, layer.weight, layer.bias))


@pytest.mark.parametrize(("mean", "std", "rtol"), [(1, 3, 1e-5), (1000, 0.1, 3e-3)])
def test_batch_norm_of_slices_equals_batch_norm_of_the_batch_in_float64(
    monkeypatch: pytest.MonkeyPatch, mean: float, std: float, rtol: float
) -> None:
    """Slices of 2 and 3 images in two threads.

    A float32 mean of 1000 is off by up to 3e-5, which is 3e-4 of a deviation of 0.1; the tolerance is ten times that.
    E[x²] - E[x]² in float32 is off by about 0.06 there, six times the variance.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 8, 8) * std + mean, torch.randn(5, 3, 8, 8)
    whole, *layers = (torch.nn.BatchNorm2d(3) for _ in range(3))
    with torch.no_grad():
        whole.weight.uniform_(0.5, 2), whole.bias.uniform_(-1, 1), whole.running_mean.fill_(mean)
    for layer in layers:
        layer.load_state_dict(whole.state_dict())
        sync_batchnorm(torch.nn.Sequential(layer), torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", Exchange())
    with ThreadPoolExecutor(2) as threads:
        a, b = threads.map(batch_norm_step, layers, (x[:2], x[2:]), (weight[:2], weight[2:]))
    found = (*(torch.cat(parts) for parts in zip(a[:2], b[:2], strict=True)), a[2] + b[2], a[3] + b[3])
    expected = batch_norm_step(whole.double(), x.double(), weight.double())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= rtol * other.norm()
    for layer in layers:
        torch.testing.assert_close(layer.double().state_dict(), whole.state_dict(), rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.eval()(x.double()), whole.eval()(x.double()), rtol=1e-3, atol=1e-3)
