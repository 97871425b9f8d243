"""Facts of this machine that bear on a plan."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kmine.setup.device import resolve_device
from kmine.training.precision import fastest_precision

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """The device that trains, by name, its fastest precision, and the cores and the memory (free now) beside it."""

    device: str
    is_gpu: bool
    cores: int
    ram_gb: float
    gpu_gb: float
    precision: str


def this_machine(device: str) -> Machine:
    """Facts for a device of `kmine.setup.device`; loads torch. Raises `UserError` for a GPU that is not there."""
    import torch

    found = resolve_device(device)
    is_gpu = found.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(found) if is_gpu else platform.processor() or platform.machine() or "cpu",
        is_gpu=is_gpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_gb=round(free_memory() / 2**30, 1),
        gpu_gb=round(torch.cuda.mem_get_info(found)[0] / 2**30, 1) if is_gpu else 0.0,
        precision=fastest_precision(on_gpu=is_gpu),
    )


def free_memory() -> int:
    """Bytes that are available, at most the limit of this container."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError, IndexError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    for path in CGROUPS:
        with suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found)
