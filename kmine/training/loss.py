"""Cross-entropy + soft Dice with ignored pixels and weights of images or pixels.

Letters: B images, K classes, H, W. Pseudo masks need weights, which segmentation-models-pytorch's DiceLoss lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kmine.types import IGNORE_INDEX


def segmentation_loss(
    logits: Tensor, target: Tensor, weights: Tensor, dice_weight: float, *, by_image: bool = True
) -> Tensor:
    """Weighted cross-entropy over pixels plus `dice_weight` x soft Dice loss of the foreground classes.

    The Dice of a class is that of each image that shows it (mean over these), or without `by_image` that of the batch
    as one image; then the mean over the classes that occur.

    `logits` are (B, K, H, W) float, `target` (B, H, W) int64 class ids with 255 = ignore. `weights`, (B,) or (B, H, W)
    float, are those of each image or each pixel; only their ratios matter. Returns a scalar; 0 (with gradient) if every
    pixel is ignored or has weight 0.
    """
    valid = target != IGNORE_INDEX
    pixel_weights = (weights if weights.ndim == 3 else weights[:, None, None]) * valid
    entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE_INDEX, reduction="none")
    loss = (entropy * pixel_weights).sum() / pixel_weights.sum().clamp_min(1e-6)
    if dice_weight:
        loss = loss + dice_weight * _dice_loss(logits, target, pixel_weights, by_image)
    return loss


def _dice_loss(logits: Tensor, target: Tensor, pixel_weights: Tensor, by_image: bool) -> Tensor:
    """1 - soft Dice, see `segmentation_loss`; an image counts by the mean weight of its pixels that have any."""
    probs = logits.float().softmax(dim=1)[:, 1:]
    classes = torch.arange(1, logits.shape[1], device=target.device)[None, :, None, None]
    truth = (target[:, None] == classes).float()
    w = pixel_weights[:, None]
    dims = (2, 3) if by_image else (0, 2, 3)
    overlap = (probs * truth * w).sum(dim=dims)
    total = ((probs + truth) * w).sum(dim=dims)
    present = ((truth * w).sum(dim=dims) > 0).float()
    scores = 1 - (2 * overlap + 1e-6) / (total + 1e-6)
    if by_image:
        weights = pixel_weights.sum(dim=(1, 2)) / (pixel_weights > 0).sum(dim=(1, 2)).clamp_min(1)
        counts = present * weights[:, None]
        scores = (scores * counts).sum(dim=0) / counts.sum(dim=0).clamp_min(1e-12)
        present = (counts.sum(dim=0) > 0).float()
    return (scores * present).sum() / present.sum().clamp_min(1)
