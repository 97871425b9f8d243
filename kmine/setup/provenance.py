"""Provenance of a run for run.json: command, versions, commit, data; time, memory and parameters."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from kmine.config import LoopConfig
from kmine.data.source import Source
from kmine.models.build import build_model
from kmine.store.run_folder import FOLD_TRAININGS, RunFolder
from kmine.training.precision import resolve_precision
from kmine.training.task import Task

PACKAGES = ("kmine", "torch", "lightning", "segment-anything", "timm", "segmentation-models-pytorch", "albumentations")
PACKAGES += ("opencv-python-headless", "numpy", "nibabel", "pydicom", "monai", "transformers")
"""Packages whose versions run.json records."""


def count_parameters(task: Task) -> int:
    """Number of parameters of the task's local model."""
    model = build_model(task.cfg.model, task.num_classes, task.cfg.seed, pretrained=False)
    return sum(p.numel() for p in model.parameters())


@contextmanager
def preparing(run: RunFolder) -> Iterator[None]:
    """Add the seconds of the block (adaptation, calibration) to run.json, without those of trainings inside it.

    Trainings record their own. Seconds add up over the sessions of a run; interrupted sessions do not count.
    """

    def trained() -> float:
        return sum(run.training_seconds(pattern) for pattern in (*FOLD_TRAININGS, "round_00"))

    before, began, earlier = trained(), time.perf_counter(), run.run().get("preparation_seconds", 0.0)
    yield
    spent = time.perf_counter() - began - (trained() - before)
    run.update_run(preparation_seconds=round(earlier + max(0.0, spent), 1))


def provenance(cfg: LoopConfig, task: Task, source: Source, data_contents: dict[str, str]) -> dict[str, Any]:
    """Fields of run.json on the origin of the run; `data_contents` are the fingerprints of images and masks."""
    import torch

    return {
        "command": "kmine " + " ".join(sys.argv[1:]) if sys.argv[0].endswith("kmine") else " ".join(sys.orig_argv),
        "git_commit": git_commit(),
        "seed": cfg.seed,
        "dataset": source.name,
        "class_names": list(source.class_names),
        "channels": list(getattr(source, "file_channels", ())),
        "segmenter": task.segmenter.name if task.segmenter else "none",
        "segmenter_sha256": task.segmenter.signature if task.segmenter else "none",
        "device": torch.cuda.get_device_name() if task.fabric.device.type == "cuda" else platform.processor() or "cpu",
        "precision": resolve_precision(cfg.fit.precision, on_gpu=task.fabric.device.type == "cuda"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "data_contents": data_contents,
        "splits": {"labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "val": len(task.val)},
    }


def git_commit() -> str:
    """Commit of kmine's own checkout, with `+` if files differ from it; `none` outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def forget_peak_memory() -> None:
    """Reset the peak to the memory in use, on systems that support it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> int:
    """Peak resident memory of this process in MB since its start or `forget_peak_memory`; 0 on Windows: unknown."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
