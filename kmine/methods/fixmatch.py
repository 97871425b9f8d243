"""FixMatch for segmentation, as in UniMatch (arXiv 2208.09910): confident weak-view labels supervise the strong view.

Letters: U unlabeled images, V strong views, K classes, H, W. Differences to the paper: one strong view instead of two
(`kmine.methods.unimatch` has both); weak views pass the model in eval mode; all images of a step pass it in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FixmatchConfig, UnimatchConfig
from kmine.data.batches import places_for_unlabeled
from kmine.errors import UserError
from kmine.io.files import sign
from kmine.training.ema import EMA
from kmine.training.fit import Consistency, ConsistencyFn, ConsistencyTarget, UnlabeledViews
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "fixmatch"


def fixmatch(task: Task) -> Iterator[RoundResult]:
    """Round 0 of mining, then as many rounds and steps on labels and on confident predictions.

    Predictions on the weak view of an unlabeled image are the labels of its strong view, which holds rectangles of
    other images, and of the weak view with channels dropped. Masks, stored pseudo masks and image-level labels of
    unlabeled images are not read. With weight 0 no unlabeled image takes part.

    Raises:
        UserError: no place for unlabeled images in a batch (`fit.labeled_share`), or `fit.augment` is off.
    """
    cfg = task.cfg.fixmatch
    require_views(task, METHOD_DIR, cfg.weight)
    views = {"strong": True, "cutmix": cfg.cutmix, "ema_decay": task.cfg.fit.ema_decay}
    consistency = Consistency(sign(METHOD_DIR, asdict(cfg)), fixmatch_consistency(cfg), **views)
    return train_rounds(task, METHOD_DIR, lambda _: {"consistency": consistency} if cfg.weight else {})


def require_views(task: Task, name: str, weight: float) -> None:
    """Raise `UserError` if the method `name` has no views to compare, or, with a `weight`, no place for them."""
    if not task.cfg.fit.augment:
        raise UserError(f"fit.augment: expected true for {name}, got False; without it all views are one")
    if weight:
        places_for_unlabeled(task.unlabeled, task.cfg.fit.batch_size, task.cfg.fit.labeled_share)


def fixmatch_consistency(cfg: FixmatchConfig | UnimatchConfig, *, has_teacher: bool = False) -> ConsistencyFn:
    """Loss on confident predictions, for the strong views and for the weak view with channels dropped.

    Half of the weight is that of the strong views together. `has_teacher`: the predictions are those of the running
    average, not of the model.
    """

    def consistency_fn(net: nn.Module, views: UnlabeledViews, step: int, ema: EMA | None) -> ConsistencyTarget:
        assert ema is not None or not has_teacher, "a teacher needs averaged weights"
        with ema.applied() if has_teacher and ema else nullcontext():
            confidence, classes = net(views.weak).float().softmax(dim=1).max(dim=1)
        confident, count = confidence > cfg.threshold, len(views.strong)

        def loss(logits: Tensor) -> Tensor:
            mixed = [apply_cutmix(planes, views.source) for planes in (classes, confident)]
            strong = masked_cross_entropy(logits[:count], *mixed, views.source >= 0)
            perturbed = masked_cross_entropy(logits[count:], classes, confident, views.valid)
            return cfg.weight * (strong + perturbed) / 2

        images = torch.cat([views.strong, views.weak])
        is_perturbed = torch.arange(len(images), device=images.device) >= count
        return ConsistencyTarget(images, loss, perturbed=is_perturbed, rate=cfg.feature_perturbation)

    return consistency_fn


def apply_cutmix(planes: Tensor, source: Tensor) -> Tensor:
    """(U, H, W) planes of the weak views, mixed like the V*U strong ones: each pixel from its place in `source`."""
    return planes.gather(0, source.clamp_min(0))


def masked_cross_entropy(logits: Tensor, classes: Tensor, confident: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with `classes` where `confident`, as a mean over all valid pixels: few confident ones weigh little.

    `logits` are (N, K, H, W) float, `classes` (N, H, W) int64; `confident` and `valid`, inside an image, bool as those.
    """
    cross_entropy = F.cross_entropy(logits.float(), classes, reduction="none")
    return (cross_entropy * (confident & valid)).sum() / valid.sum().clamp_min(1)
