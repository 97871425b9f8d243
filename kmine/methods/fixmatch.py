"""FixMatch for segmentation, as in UniMatch (arXiv 2208.09910): the weak view teaches the strong one where it is sure.

Letters: U unlabeled images, K classes, H, W. Our reading, with one strong view instead of two; what is sure is asked of
the model in eval mode; all images of a step pass the model in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FixmatchConfig
from kmine.data.batches import places_for_unlabeled
from kmine.errors import UserError
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

METHOD_DIR = "fixmatch"


def fixmatch(task: Task) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then as many rounds and steps on the labels and on what the model is sure of.

    Of each unlabeled image the weak view says the classes; they are taught to its strong view, rectangles of other ones
    in it, and to the weak view itself while it lacks channels. No mask, no pseudo mask made beforehand and no
    image-level label of an unlabeled image is looked at. With weight 0 no unlabeled image takes part.

    Raises:
        UserError: there is no place for unlabeled images in a batch (`fit.labeled_share`), or `fit.augment` is off.
    """
    cfg = task.cfg.fixmatch
    if not task.cfg.fit.augment:
        raise UserError("fit.augment: expected true for fixmatch, got False; without it the two views are one")
    if cfg.weight:
        places_for_unlabeled(task.unlabeled, task.cfg.fit.batch_size, task.cfg.fit.labeled_share)
    consistency = Consistency(
        sign(METHOD_DIR, asdict(cfg)),
        fixmatch_consistency(cfg),
        strong=True,
        cutmix=cfg.cutmix,
        ema_decay=task.cfg.fit.ema_decay,
    )
    return train_rounds(task, METHOD_DIR, lambda _: {"consistency": consistency} if cfg.weight else {})


def fixmatch_consistency(cfg: FixmatchConfig) -> ConsistencyFn:
    """What a model is asked: what it is sure of, of the strong view and of the weak one with channels dropped."""

    def consistency_fn(net: nn.Module, views: UnlabeledViews, step: int, ema: EMA | None) -> ConsistencyTarget:
        confidence, classes = net(views.weak).float().softmax(dim=1).max(dim=1)
        confident, count = confidence > cfg.threshold, len(classes)

        def loss(logits: Tensor) -> Tensor:
            strong = masked_cross_entropy(
                logits[:count],
                apply_cutmix(classes, views.source),
                apply_cutmix(confident, views.source),
                views.source >= 0,
            )
            perturbed = masked_cross_entropy(logits[count:], classes, confident, views.valid)
            return cfg.weight * (strong + perturbed) / 2

        images = torch.cat([views.strong, views.weak])
        is_perturbed = torch.arange(2 * count, device=images.device) >= count
        return ConsistencyTarget(images, loss, perturbed=is_perturbed, rate=cfg.feature_perturbation)

    return consistency_fn


def apply_cutmix(planes: Tensor, source: Tensor) -> Tensor:
    """(U, H, W) planes of the weak views, mixed as the strong ones were: each pixel from image `source`, same place."""
    return planes.gather(0, source.clamp_min(0))


def masked_cross_entropy(logits: Tensor, classes: Tensor, confident: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with `classes` where `confident`, as a mean over all known pixels: few sure ones weigh little.

    Args:
        logits: (U, K, H, W) float.
        classes: (U, H, W) int64.
        confident: (U, H, W) bool.
        valid: (U, H, W) bool, pixels inside an image.
    """
    cross_entropy = F.cross_entropy(logits.float(), classes, reduction="none")
    return (cross_entropy * (confident & valid)).sum() / valid.sum().clamp_min(1)
