"""What made a run: versions, commit, memory, parameters."""

from __future__ import annotations

import platform
import resource
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
from kmine.setup.open import content_fingerprints
from kmine.store.run_folder import FOLD_TRAININGS, RunFolder
from kmine.training.task import Task

PACKAGES = (
    "kmine",
    "torch",
    "lightning",
    "segment-anything",
    "timm",
    "segmentation-models-pytorch",
    "albumentations",
    "opencv-python-headless",
    "numpy",
    "nibabel",
    "pydicom",
    "monai",
)
"""Whose versions run.json records."""


def count_parameters(task: Task) -> int:
    """Of the local model."""
    model = build_model(task.cfg.model, task.num_classes, task.cfg.seed, pretrained=False)
    return sum(p.numel() for p in model.parameters())


@contextmanager
def preparing(store: RunFolder) -> Iterator[None]:
    """Book in run.json the seconds of what is prepared inside: adapting, calibrating. Trainings book their own.

    They add up over the sessions of a run; what an earlier session left unfinished is not in them.
    """

    def trained() -> float:
        return sum(store.training_seconds(pattern) for pattern in (*FOLD_TRAININGS, "round_00"))

    before, began, earlier = trained(), time.perf_counter(), store.run().get("preparation_seconds", 0.0)
    yield
    spent = time.perf_counter() - began - (trained() - before)
    store.update_run(preparation_seconds=round(earlier + max(0.0, spent), 1))


def provenance(cfg: LoopConfig, task: Task, source: Source) -> dict[str, Any]:
    """What run.json says of where the numbers come from."""
    import torch

    return {
        "command": "kmine " + " ".join(sys.argv[1:]) if sys.argv[0].endswith("kmine") else " ".join(sys.orig_argv),
        "git_commit": git_commit(),
        "seed": cfg.seed,
        "dataset": source.name,
        "class_names": list(source.class_names),
        "segmenter": task.segmenter.name if task.segmenter else "none",
        "segmenter_sha256": task.segmenter.signature if task.segmenter else "none",
        "device": torch.cuda.get_device_name() if task.fabric.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "data_contents": content_fingerprints(cfg, source, task.run),
        "splits": {"labeled": len(task.labeled), "unlabeled": len(task.unlabeled), "val": len(task.val)},
    }


def git_commit() -> str:
    """Commit of kmine's own checkout, `+` appended where files differ from it; `none` outside one."""
    package_dir = Path(__file__).parents[1]  # the package
    try:
        git = ["git", "-C", str(package_dir)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def forget_peak_memory() -> None:
    """Let the peak begin anew at what is held now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> int:
    """Peak resident memory of this process so far, or since `forget_peak_memory`, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
