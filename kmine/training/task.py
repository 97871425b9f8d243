"""What a method is given, and what it keeps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kmine.config import LoopConfig, ModelConfig
from kmine.data.pool import Pool
from kmine.feedback.verdict_effects import NO_VERDICTS, VerdictEffects
from kmine.ops.calibrator import Calibration
from kmine.segmenters.base import Segmenter
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import make_fabric
from kmine.types import ProgressReporter


@dataclass(frozen=True)
class Task:
    """What a method is given. The unlabeled pool is opened without masks; the test split is not here at all."""

    cfg: LoopConfig
    num_classes: int
    labeled: Pool
    unlabeled: Pool
    val: Pool
    segmenter: Segmenter | None
    """None where nothing is mined (`rounds` 0)."""
    fabric: Any
    signature: str
    """Of the data, the splits and the seed."""
    progress: ProgressReporter
    run: RunFolder
    """The run folder, where artifacts are kept."""
    calibration: Calibration | None = None
    """What the gate goes by; None: thresholds on the evidence."""
    auxiliary_model: ModelConfig | None = None
    """A second local model, whose agreement is evidence."""
    review: VerdictEffects = NO_VERDICTS  # what a person said of an earlier run's masks


@dataclass(frozen=True)
class Checkpoints:
    """A model's two checkpoints and the signature of how they came about."""

    signature: str
    best: dict[str, Tensor]
    final: dict[str, Tensor]
    seconds: float


@dataclass
class StageTimer:
    """Seconds per stage: `lap(name)` books the time since the lap before."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def single_process(task: Task) -> Task:
    """The task for what one process does by itself, of several that share the others."""
    if task.fabric.world_size == 1:
        return task
    return replace(task, fabric=make_fabric(task.cfg.device, task.cfg.fit.precision, local=True))
