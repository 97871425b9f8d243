"""Several processes on one run (`torchrun`, `fabric run`): who does which part, and how parts become the whole.

Every process runs the same program with the same settings. In training each takes its slice of every batch; what the
network says of the slices is put together before the loss, so that loss and gradient are those of the whole batch.
Batch norm's statistics are the whole batch's, too. Process 0 leads: it alone writes what belongs to the run as a whole.
With a single process everything here is the plain thing. Layers that draw numbers (dropout) draw by process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from kmine.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")


def is_distributed_launch() -> bool:
    """Whether this process is one of several that `torchrun` or `fabric run` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def make_fabric(device: str, precision: str, *, local: bool = False) -> Fabric:
    """Lightning Fabric on `device` (auto, cpu, cuda, cuda:N) in `precision` (auto, 32, bf16, 16).

    Of several processes, started by `torchrun` or `fabric run`, each has the GPU of its number; unless it is to be
    `local`, it joins the others, which may take hours to come (what process 0 does alone, the others wait for).
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy

    accelerator, _, index = device.partition(":")
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "16") if on_gpu else "32"
    plugin = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision]
    if not is_distributed_launch():
        return Fabric(accelerator=accelerator, devices=[int(index)] if index else 1, precision=plugin)
    if index:
        raise UserError(f"device: expected cpu, cuda or auto where several processes share the work, got {device!r}")
    if local:
        devices = [int(os.environ["LOCAL_RANK"])] if on_gpu else 1
        return Fabric(accelerator=accelerator, devices=devices, precision=plugin, plugins=[LightningEnvironment()])
    local_world_size, world_size = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    # Networks have parts that segmentation does not read: the head of sks's classifier.
    strategy = DDPStrategy(timeout=timedelta(days=7), find_unused_parameters=True)
    nodes = world_size // local_world_size
    fabric = Fabric(
        accelerator=accelerator, devices=local_world_size, num_nodes=nodes, strategy=strategy, precision=plugin
    )
    fabric.launch()
    return fabric


class DeviceContext(Protocol):
    """What Lightning's Fabric and `SingleDevice` share: a device, and the rank of this process."""

    @property
    def device(self) -> torch.device: ...
    @property
    def world_size(self) -> int: ...
    @property
    def global_rank(self) -> int: ...
    def barrier(self, name: str | None = None) -> None: ...


@dataclass(frozen=True)
class SingleDevice:
    """A device and one process; takes the place of Fabric, which needs 260 MB, if nothing is trained."""

    device: torch.device
    world_size: int = 1
    global_rank: int = 0

    def barrier(self, name: str | None = None) -> None:
        """Return at once."""


def rank_slice(count: int, fabric: DeviceContext) -> slice:
    """This process's run of `count` items; the runs of all processes follow one another and differ by one at most."""
    rank, size = fabric.global_rank, fabric.world_size
    return slice(count * rank // size, count * (rank + 1) // size)


def shard(items: Sequence[T], fabric: DeviceContext) -> list[T]:
    """This process's share of `items`, dealt out like cards; `gather_shards` puts the shares together."""
    return list(items[fabric.global_rank :: fabric.world_size])


def gather_shards(local_items: Sequence[T], fabric: DeviceContext) -> list[T]:
    """All items in their old order, in every process, from the shares that `shard` gave."""
    if fabric.world_size == 1:
        return list(local_items)
    shards: list[list[T]] = [[] for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(shards, list(local_items))
    return [shards[n % fabric.world_size][n // fabric.world_size] for n in range(sum(map(len, shards)))]


@contextmanager
def rank_zero_first(fabric: DeviceContext) -> Iterator[None]:
    """A block that process 0 runs before the others do; they find what it has written."""
    if fabric.world_size == 1:
        yield
        return
    with cast("Fabric", fabric).rank_zero_first():
        yield


def forward(net: nn.Module, images: Tensor, fabric: DeviceContext) -> Tensor:
    """The logits of all `images` in every process, each of which ran its slice; gradients find their way back.

    The gradient of a loss on them, averaged over the processes as `DistributedDataParallel` does, is that of one
    process: each sends every slice the same gradient, which is the number of processes times its part of the average.

    Args:
        net: as fabric set it up.
        images: (B, ...), the same in every process, at least one for each.
        fabric: of this run.

    Raises:
        UserError: fewer images than processes.
    """
    size = fabric.world_size
    if size == 1:
        return net(images)
    if len(images) < size:
        raise UserError(
            f"fit.batch_size: expected an image for each of {size} processes in a batch, got {len(images)}; enlarge it"
        )
    local_rows = rank_slice(len(images), fabric)
    logits = net(images[local_rows])
    whole = logits.new_zeros(len(images), *logits.shape[1:])
    whole[local_rows] = logits
    return _AllReduce.apply(whole)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs.

    `torch.distributed.nn.functional.all_reduce` is the same; torch 2.14 deprecates it for a private module.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """(...) -> (...)."""
        total = grad.clone()
        torch.distributed.all_reduce(total)
        return total


def sync_batchnorm(module: nn.Module, fabric: Fabric) -> None:
    """Let the batch norms of `module` see the whole batch; a GPU has torch's own layers for it, a CPU has these."""
    if fabric.world_size == 1:
        return
    if fabric.device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(module)
        return
    from timm.layers import BatchNormAct2d

    for layer in module.modules():
        # The class alone changes: weights, buffers, their names and whoever holds the layer stay as they are.
        if type(layer) is BatchNormAct2d:
            layer.__class__ = _sync_batchnorm_act(BatchNormAct2d)
        elif type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNormCPU


class SyncBatchNormCPU(nn.BatchNorm2d):
    """Batch norm over the slices of all processes; torch's SyncBatchNorm refuses a CPU."""

    def forward(self, input: Tensor) -> Tensor:  # torch's own name for it
        """(B, C, H, W) -> the same shape."""
        return _normalised(self, input) if self.training else super().forward(input)


@cache
def _sync_batchnorm_act(base: type[nn.BatchNorm2d]) -> type[nn.BatchNorm2d]:
    """The same of timm's batch norm, which has an activation behind it."""

    class SyncBatchNormActCPU(base):  # type: ignore[misc, valid-type]  # timm is loaded only where it is used
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(_normalised(self, x))) if self.training else super().forward(x)

    return SyncBatchNormActCPU


def _normalised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """(B, C, H, W) by mean and variance over all processes; updates the running statistics.

    In float32 or wider. Two reductions, the second of squared deviations from the shared mean: E[x²] - E[x]², one
    reduction, cancels where the mean is large beside the deviation.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_tensor([wide.numel() / wide.shape[1]])
    sums = _AllReduce.apply(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = wide - mean[:, None, None]
    var = _AllReduce.apply(centered.square().sum(dim=(0, 2, 3))) / count
    with torch.no_grad():
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * count / (count - 1).clamp_min(1), layer.momentum)
    scale = (var + layer.eps).rsqrt() * layer.weight
    return (centered * scale[:, None, None] + layer.bias[:, None, None]).to(x.dtype)
