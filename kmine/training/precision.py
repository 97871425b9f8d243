"""The precision in which a device trains fastest."""

from __future__ import annotations


def resolve_precision(precision: str, *, on_gpu: bool) -> str:
    """`fit.precision` with auto resolved for this machine."""
    return fastest_precision(on_gpu=on_gpu) if precision == "auto" else precision


def fastest_precision(*, on_gpu: bool) -> str:
    """Precision of training that is fastest here: bf16, 16 or 32.

    A GPU that only emulates bf16 gets 16. A CPU gets bf16 where it has AMX (Intel Xeon of 2023 and later): 1.2 to 2.6
    times the steps a second of 32. With oneDNN held to older instructions bf16 was slower than 32 on the same
    processor, ten times with AVX2 (benchmarks/cpu_precision.py).
    """
    import torch

    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16", False) else "32"
