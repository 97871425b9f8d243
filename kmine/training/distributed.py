"""Several processes on one run, started by `torchrun` or `fabric run`, each with the same program and settings.

In training each runs the network on its slice of every batch; loss, gradient and batch norm's statistics are those of
the whole batch, but random layers draw different numbers. Only process 0 writes files of the run as a whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from kmine.errors import UserError
from kmine.models.sync_batchnorm import AllReduce
from kmine.training.precision import resolve_precision

if TYPE_CHECKING:
    from lightning.fabric import Fabric
else:
    Fabric = Any  # the class takes a second and 260 MB to load; not needed without training

T = TypeVar("T")


def is_distributed_launch() -> bool:
    """Whether `torchrun` or `fabric run` started this process together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def make_fabric(device: str, precision: str, *, local: bool = False) -> Fabric:
    """Lightning Fabric on `device` (auto, cpu, cuda, cuda:N) in `precision` (auto, 32, bf16, 16).

    In a distributed launch each process uses the GPU of its local rank and joins the process group. Its timeout is 7
    days, since the other processes wait while process 0 works. `local` gives a Fabric of this process only.

    Raises:
        UserError: a device with a number in a distributed launch.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy

    accelerator, _, index = device.partition(":")
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    for package in ("fabric", "pytorch"):  # it says the precision, which run.json has
        logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
    plugins = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    plugin = plugins[resolve_precision(precision, on_gpu=on_gpu)]
    if not is_distributed_launch():
        return Fabric(accelerator=accelerator, devices=[int(index)] if index else 1, precision=plugin)
    if index:
        raise UserError(f"device: expected cpu, cuda or auto if several processes share the work, got {device!r}")
    if local:
        devices = [int(os.environ["LOCAL_RANK"])] if on_gpu else 1
        return Fabric(accelerator=accelerator, devices=devices, precision=plugin, plugins=[LightningEnvironment()])
    local_world_size, world_size = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    # Segmentation does not use every parameter: the head of the classifier of sks has no gradient.
    strategy = DDPStrategy(timeout=timedelta(days=7), find_unused_parameters=True)
    nodes = world_size // local_world_size
    settings = {"accelerator": accelerator, "precision": plugin, "strategy": strategy}
    fabric = Fabric(devices=local_world_size, num_nodes=nodes, **settings)
    fabric.launch()
    return fabric


class DeviceContext(Protocol):
    """What Lightning's Fabric and `SingleDevice` share: a device, and the rank of this process."""

    @property
    def device(self) -> torch.device:
        """Of models and batches."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def global_rank(self) -> int:
        """Number of this process, from 0."""

    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes have reached this call."""


@dataclass(frozen=True)
class SingleDevice:
    """A device and one process; takes the place of Fabric, which needs 260 MB, if nothing is trained."""

    device: torch.device
    world_size: int = 1
    global_rank: int = 0

    def barrier(self, name: str | None = None) -> None:
        """Return at once."""


def rank_slice(count: int, fabric: DeviceContext) -> slice:
    """Slice of `count` items for this rank: contiguous, in rank order, lengths differ by one at most."""
    rank, size = fabric.global_rank, fabric.world_size
    return slice(count * rank // size, count * (rank + 1) // size)


def shard(items: Sequence[T], fabric: DeviceContext) -> list[T]:
    """Items of this rank, round-robin. Inverse: `gather_shards`."""
    return list(items[fabric.global_rank :: fabric.world_size])


def gather_shards(local_items: Sequence[T], fabric: DeviceContext) -> list[T]:
    """Items of all ranks in their original order, in every process."""
    if fabric.world_size == 1:
        return list(local_items)
    shards: list[list[T]] = [[] for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(shards, list(local_items))
    return [shards[n % fabric.world_size][n // fabric.world_size] for n in range(sum(map(len, shards)))]


@contextmanager
def rank_zero_first(fabric: DeviceContext) -> Iterator[None]:
    """Run the block in process 0 before the others, which then read the files it has written."""
    with cast(Fabric, fabric).rank_zero_first() if fabric.world_size > 1 else nullcontext():
        yield


def forward(net: nn.Module, images: Tensor, fabric: DeviceContext) -> Tensor:
    """Logits of all `images` (B, ...) in every process, each of which runs its slice; differentiable.

    Fabric's `DistributedDataParallel` around `net` averages parameter gradients over N processes. The all-reduce sums
    the N equal gradients of the logits, which compensates for that.

    Raises:
        UserError: fewer images than processes.
    """
    size = fabric.world_size
    if size == 1:
        return net(images)
    if len(images) < size:
        raise UserError(
            f"fit.batch_size: expected an image for each of {size} processes in a batch, got {len(images)}; increase it"
        )
    local_rows = rank_slice(len(images), fabric)
    logits = net(images[local_rows])
    whole = logits.new_zeros(len(images), *logits.shape[1:])
    whole[local_rows] = logits
    return AllReduce.apply(whole)
