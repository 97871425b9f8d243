"""Names of compute devices: auto, cpu, cuda, cuda:N."""

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
