"""Inputs of a method: data, settings, device, run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from kmine.config import LoopConfig, ModelConfig
from kmine.data.pool import Pool
from kmine.feedback.verdict_effects import NO_VERDICTS, VerdictEffects
from kmine.ops.calibrator import Calibration
from kmine.segmenters.base import Segmenter
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import DeviceContext, make_fabric
from kmine.types import ProgressReporter


@dataclass(frozen=True)
class Task:
    """Inputs of a method. The unlabeled pool withholds its masks; the test split is not part of a task."""

    cfg: LoopConfig
    num_classes: int
    """Background included."""
    labeled: Pool
    unlabeled: Pool
    val: Pool
    segmenter: Segmenter | None
    """None if nothing is mined (`rounds` 0)."""
    fabric: DeviceContext
    """Lightning Fabric; a `SingleDevice` if nothing is trained."""
    signature: str
    """Of the data, the splits and the seed."""
    progress: ProgressReporter
    run: RunFolder
    """Where artifacts are written."""
    calibration: Calibration | None = None
    """Estimates quality for the gate; None: the gate compares evidence with thresholds."""
    auxiliary_model: ModelConfig | None = None
    """A second local model, whose agreement is evidence."""
    review: VerdictEffects = NO_VERDICTS
    """A reviewer's verdicts on the masks of an earlier run."""
    mining_batch_size: int = 16
    """Images that mining and calibration hold in memory and save together; an interruption costs at most as many."""


@dataclass
class StageTimer:
    """Seconds per stage of a round, measured in laps."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to stage `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def single_process(task: Task) -> Task:
    """The task for work that one of several processes does without the others."""
    if task.fabric.world_size == 1:
        return task
    return replace(task, fabric=make_fabric(task.cfg.device, task.cfg.fit.precision, local=True))
