"""Compute devices: names (auto, cpu, cuda, cuda:N), and the precision that is fastest on each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kmine.errors import UserError

if TYPE_CHECKING:
    import torch


def require_device_name(name: str) -> None:
    """Raise `UserError` unless `name` is auto, cpu, cuda or cuda:N; torch is not loaded."""
    if name == "mps":
        raise UserError("device: expected auto, cpu, cuda or cuda:N, got 'mps'; Apple's GPU is not supported, use cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; auto is the first GPU, else the CPU.

    Raises:
        UserError: an unknown name, or a GPU that this machine does not have.
    """
    import torch

    require_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= count:
            raise UserError(f"device: expected one of the {count} GPUs here, got {name!r}; use --device cpu or auto")
    return torch.device(name)


def resolve_precision(precision: str, *, on_gpu: bool) -> str:
    """`fit.precision` with auto resolved for this machine."""
    return fastest_precision(on_gpu=on_gpu) if precision == "auto" else precision


def fastest_precision(*, on_gpu: bool) -> str:
    """Precision of training that is fastest here: bf16, 16 or 32.

    A GPU that only emulates bf16 gets 16. A CPU gets bf16 where it has AMX (Intel Xeon of 2023 and later): 1.2 to 2.6
    times the steps a second of 32. Without AMX bf16 is slower than 32, ten times without AVX-512
    (benchmarks/cpu_precision.py).
    """
    import torch

    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16", False) else "32"
