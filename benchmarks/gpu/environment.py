"""Section env: versions, device, and the rates that bound everything else."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata

import torch
from kit import Kit

PACKAGES = (
    "torch torchvision numpy opencv-python-headless albumentations lightning timm segmentation-models-pytorch "
    "segment-anything monai scipy pandas"
)


def env(kit: Kit) -> None:
    """Versions and device, matrix products, copies on the device and to it, disk."""
    kit.put("versions", f"python {platform.python_version()}, " + ", ".join(map(_version, PACKAGES.split())))
    kit.put("cores", os.cpu_count() or 0)
    if kit.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        note = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        kit.put("device", properties.name, note=note)
        if smi := shutil.which("nvidia-smi"):
            query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,utilization.gpu,memory.used"
            done = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
            kit.put("nvidia-smi", done.stdout.strip())
    cudnn = torch.backends.cudnn
    flags = f"cudnn {cudnn.allow_tf32}, cudnn.benchmark {cudnn.benchmark}"
    kit.put("TF32 as it comes", f"matmul {torch.get_float32_matmul_precision()}, {flags}")
    _compute(kit)
    _copies(kit)
    _disk(kit)


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} MISSING"


def _compute(kit: Kit) -> None:
    n = 256 if kit.tiny else 8192
    dtypes = {"fp32": torch.float32} if kit.tiny else {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(n, n, device=kit.device, dtype=dtype) for _ in range(2))
        took = kit.seconds(lambda a=a, b=b: a @ b, 5)
        predicted = {"bf16": 798, "fp32": 50}[name]
        kit.put(f"matrix product {n}, {name}", 2 * n**3 / took / 1e12, "TFLOP/s", predicted)


def _copies(kit: Kit) -> None:
    large = torch.empty(2**20 if kit.tiny else 2**31, dtype=torch.uint8, device=kit.device)
    other = torch.empty_like(large)
    took = kit.seconds(lambda: other.copy_(large), 5)
    kit.put("device copy, bytes read and written", 2 * large.nbytes / took / 1e12, "TB/s", 3.0)
    if kit.on_gpu:
        batch = torch.zeros(16, 352, 352, 4, dtype=torch.uint8)
        for name, held, predicted in (("pageable", batch, "0.8-1.5"), ("pinned", batch.pin_memory(), "0.2")):
            took = kit.seconds(lambda held=held: held.to(kit.device, non_blocking=True), 9)
            kit.put(f"a batch of 16 at 352 px to the device, {name}", took * 1e3, "ms", predicted)


def _disk(kit: Kit) -> None:
    blob = os.urandom(2**20) * (4 if kit.tiny else 256)
    began = time.perf_counter()
    with (kit.work / "blob").open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    kit.put("disk, written and synced", len(blob) / (time.perf_counter() - began) / 1e9, "GB/s")
    (kit.work / "blob").unlink()
