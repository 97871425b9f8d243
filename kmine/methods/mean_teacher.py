"""Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780): consistency with the average of the model's weights.

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
from kmine.training.fit import Consistency, ConsistencyFn, ConsistencyTarget, UnlabeledViews
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "mean_teacher"


def mean_teacher(task: Task) -> Iterator[RoundResult]:
    """Round 0 of mining, then as many rounds and steps on labels and on consistency with the teacher.

    The teacher is the exponential moving average of the model's weights in this round, in eval mode. Its input is each
    unlabeled image at the same place, in unchanged colours. As in the paper, its weights are validated and kept.
    Masks, pseudo masks and image-level labels of unlabeled images are not read. With weight 0 none takes part.

    Raises:
        UserError: no place for unlabeled images in a batch (`fit.labeled_share`).
    """
    cfg, round_steps = task.cfg.teacher, task.cfg.fit.round_steps
    if cfg.weight:
        places_for_unlabeled(task.unlabeled, task.cfg.fit.batch_size, task.cfg.fit.labeled_share)

    def inputs(steps: int) -> dict[str, Consistency]:
        # Rounds are signed without their steps, as before the retrained model had a ramp of its own length.
        length = [steps] if cfg.ramp_up and steps != round_steps else []
        signature = sign(METHOD_DIR, asdict(cfg), *length)
        return {"consistency": Consistency(signature, mean_teacher_consistency(cfg, steps), ema_decay=cfg.decay)}

    return train_rounds(task, METHOD_DIR, lambda _: inputs(round_steps) if cfg.weight else {}, once_inputs=inputs)


def mean_teacher_consistency(cfg: TeacherConfig, steps: int) -> ConsistencyFn:
    """Loss against the teacher's probabilities, in a training of `steps` steps."""

    def consistency_fn(net: nn.Module, views: UnlabeledViews, step: int, ema: EMA | None) -> ConsistencyTarget:
        assert ema is not None, "a mean teacher needs averaged weights"
        with ema.applied():
            teacher = net(views.weak).float().softmax(dim=1)
        weight = cfg.weight * ramp_up(step, cfg.ramp_up * steps)
        return ConsistencyTarget(views.strong, lambda logits: weight * squared_difference(logits, teacher, views.valid))

    return consistency_fn


def ramp_up(step: int, length: float) -> float:
    """exp(-5 (1 - t)^2), where t rises from 0 to 1 in `length` steps; then 1."""
    t = min(1.0, step / length) if length else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def squared_difference(logits: Tensor, teacher_probs: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid pixels and classes of the squared difference in probability.

    (U, K, H, W) `logits` of the model and probabilities of the teacher; `valid`, inside an image, is (U, H, W) bool.
    """
    gap = (logits.float().softmax(dim=1) - teacher_probs).square().mean(dim=1)
    return (gap * valid).sum() / valid.sum().clamp_min(1)
