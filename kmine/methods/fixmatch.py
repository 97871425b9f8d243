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
from kmine.store.run_folder import RunStore
from kmine.training.fit import (
    Ask,
    Asked,
    Consistency,
    SeenTwice,
)
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.training.train_steps import Average
from kmine.types import RoundResult

ARM = "fixmatch"


def fixmatch(task: Task, store: RunStore) -> Iterator[RoundResult]:
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
        sign(ARM, asdict(cfg)), asking(cfg), strong=True, cutmix=cfg.cutmix, ema_decay=task.cfg.fit.ema_decay
    )
    return train_rounds(task, store, ARM, lambda _: {"consistency": consistency} if cfg.weight else {})


def asking(cfg: FixmatchConfig) -> Ask:
    """What a model is asked: what it is sure of, of the strong view and of the weak one with channels dropped."""

    def ask(net: nn.Module, seen: SeenTwice, step: int, average: Average | None) -> Asked:
        sureness, classes = net(seen.weak).float().softmax(dim=1).max(dim=1)
        sure, count = sureness > cfg.threshold, len(classes)

        def loss(logits: Tensor) -> Tensor:
            strong = sure_entropy(
                logits[:count], moved(classes, seen.source), moved(sure, seen.source), seen.source >= 0
            )
            perturbed = sure_entropy(logits[count:], classes, sure, seen.known)
            return cfg.weight * (strong + perturbed) / 2

        images = torch.cat([seen.strong, seen.weak])
        lacking = torch.arange(2 * count, device=images.device) >= count
        return Asked(images, loss, perturbed=lacking, rate=cfg.feature_perturbation)

    return ask


def moved(planes: Tensor, source: Tensor) -> Tensor:
    """(U, H, W) planes of the weak views, mixed as the strong ones were: each pixel from image `source`, same place."""
    return planes.gather(0, source.clamp_min(0))


def sure_entropy(logits: Tensor, classes: Tensor, sure: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy with `classes` where `sure`, as a mean over all known pixels: few sure ones weigh little.

    Args:
        logits: (U, K, H, W) float.
        classes: (U, H, W) int64.
        sure: (U, H, W) bool.
        known: (U, H, W) bool, pixels inside an image.
    """
    entropy = F.cross_entropy(logits.float(), classes, reduction="none")
    return (entropy * (sure & known)).sum() / known.sum().clamp_min(1)
