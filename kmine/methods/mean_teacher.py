"""Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780): agree with the running average of yourself.

Letters: U unlabeled images, K classes, H, W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor, nn

from kmine.config import TeacherConfig
from kmine.data.batches import places_for_unlabeled
from kmine.io.files import sign
from kmine.training.ema import EMA
from kmine.training.fit import (
    Consistency,
    ConsistencyFn,
    ConsistencyTarget,
    UnlabeledViews,
)
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "mean_teacher"


def mean_teacher(task: Task) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then as many rounds and steps on the labels and on agreement with the teacher.

    The teacher is the running average of the model's weights in this round, put to eval; it sees each unlabeled image
    at the same place, in unchanged colours. It is what is validated, chosen and kept, as in the paper. No mask, no
    pseudo mask and no image-level label of an unlabeled image is looked at. With weight 0 none takes part.

    Raises:
        UserError: there is no place for unlabeled images in a batch (`fit.labeled_share`).
    """
    cfg = task.cfg.teacher
    if cfg.weight:
        places_for_unlabeled(task.unlabeled, task.cfg.fit.batch_size, task.cfg.fit.labeled_share)
    signature = sign(METHOD_DIR, asdict(cfg))
    consistency = Consistency(signature, mean_teacher_consistency(cfg, task.cfg.fit.round_steps), ema_decay=cfg.decay)
    return train_rounds(task, METHOD_DIR, lambda _: {"consistency": consistency} if cfg.weight else {})


def mean_teacher_consistency(cfg: TeacherConfig, steps: int) -> ConsistencyFn:
    """What a model is asked in a round of `steps` steps: to say what its average says."""

    def consistency_fn(net: nn.Module, views: UnlabeledViews, step: int, ema: EMA | None) -> ConsistencyTarget:
        assert ema is not None, "a mean teacher needs a running average"
        with ema.applied():
            teacher_probs = net(views.weak).float().softmax(dim=1)
        weight = cfg.weight * ramp_up(step, cfg.ramp_up * steps)
        return ConsistencyTarget(
            views.strong, lambda logits: weight * squared_difference(logits, teacher_probs, views.valid)
        )

    return consistency_fn


def ramp_up(step: int, length: float) -> float:
    """exp(-5 (1 - t)^2), where t rises from 0 to 1 in `length` steps; 1 ever after."""
    t = min(1.0, step / length) if length else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def squared_difference(logits: Tensor, teacher_probs: Tensor, valid: Tensor) -> Tensor:
    """Mean over known pixels and classes of the squared difference in probability.

    Args:
        logits: (U, K, H, W) of the model.
        teacher_probs: (U, K, H, W) probabilities of the teacher.
        valid: (U, H, W) bool, pixels inside an image.
    """
    gap = (logits.float().softmax(dim=1) - teacher_probs).square().mean(dim=1)
    return (gap * valid).sum() / valid.sum().clamp_min(1)
