"""Inputs of a method: data, settings, device, run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.config import LoopConfig, ModelConfig
from kmine.data.person_prompts import NO_PERSON, PersonPrompts
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.feedback.verdict_effects import NO_VERDICTS, VerdictEffects
from kmine.ops.calibrator import Calibration
from kmine.segmenters.base import Segmenter
from kmine.store.artifacts import CURE
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import DeviceContext, make_fabric
from kmine.types import IGNORE_INDEX, ProgressReporter


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
    """Estimates quality for the gate; None: the gate ranks objects by their evidence."""
    auxiliary_model: ModelConfig | None = None
    """A second local model, whose agreement is evidence."""
    review: VerdictEffects = NO_VERDICTS
    """A reviewer's verdicts on the masks of an earlier run."""
    person: PersonPrompts = NO_PERSON
    """Prompts that a person drew on unlabeled images."""
    dice: Literal["batch", "image"] | None = None
    """What `fit.dice` auto is, also for trainings on some of the labels; None: decided by the labels of each."""
    mining_batch_size: int = 16
    """Images that pass the stages of mining and calibration and are saved together; mining holds up to six batches in
    memory, and an interruption costs at most as many."""

    def pseudo_mask(self, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids and 255, as saved. `UserError` for a missing or damaged file, or one of another image."""
        return read_pseudo_mask(self.run, self.unlabeled, self.num_classes, round_idx, sample_id)


def read_pseudo_mask(
    run: RunFolder, unlabeled: Pool, num_classes: int, round_idx: int, sample_id: str
) -> NDArray[np.uint8]:
    """`Task.pseudo_mask`, of what can be sent to another process: a task may hold a segmenter."""
    mask, shape = run.pseudo_mask(round_idx, sample_id), unlabeled.native_shape(sample_id)
    foreign = sorted(set(np.unique(mask).tolist()) - {*range(num_classes), IGNORE_INDEX})
    if mask.shape == shape and not foreign:
        return mask
    expected = f"the class ids 0 to {num_classes - 1} and {IGNORE_INDEX}" if foreign else f"{shape} pixels"
    actual = ", ".join(map(str, foreign[:5])) if foreign else str(mask.shape)
    path = run.masks(round_idx).path(sample_id)
    raise UserError(f"{path}: expected a pseudo mask of {sample_id} of {expected}, got {actual}; {CURE}")


def auto_dice(labeled: Pool) -> Literal["batch", "image"]:
    """What `fit.dice` auto is: batch where an image of `labeled` is lesion-free. Raises as `Pool.mask_resized`."""
    return "batch" if any(map(labeled.is_clean, labeled.ids)) else "image"


@dataclass
class StageTimer:
    """Seconds per stage of a round, measured in laps."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to stage `name`."""
        self.share_lap({name: 1.0})

    def share_lap(self, weights: Mapping[str, float]) -> None:
        """Add the time since the last lap to several stages, in proportion to `weights`, of which one is above 0."""
        now = time.perf_counter()
        for name, weight in weights.items():
            passed = (now - self.last) * weight / sum(weights.values())
            self.seconds[name] = self.seconds.get(name, 0.0) + passed
        self.last = now


def single_process(task: Task) -> Task:
    """The task for work that one of several processes does without the others."""
    if task.fabric.world_size == 1:
        return task
    return replace(task, fabric=make_fabric(task.cfg.device, task.cfg.fit.precision, local=True))
