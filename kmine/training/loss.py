"""Cross-entropy + soft Dice with ignored pixels and weights of images or pixels.

Letters: B images, K classes, H, W. Pseudo masks need weights, which segmentation-models-pytorch's DiceLoss lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kmine.types import IGNORE_INDEX


def segmentation_loss(logits: Tensor, target: Tensor, weights: Tensor, dice_weight: float) -> Tensor:
    """Weighted cross-entropy over pixels plus `dice_weight` x soft Dice over the foreground classes of the batch.

    `logits` are (B, K, H, W) float, `target` (B, H, W) int64 class ids with 255 = ignore. `weights`, (B,) or (B, H, W)
    float, are those of each image or each pixel; only their ratios matter. Returns a scalar; 0 (with gradient) if every
    pixel is ignored or has weight 0.
    """
    valid = target != IGNORE_INDEX
    pixel_weights = (weights if weights.ndim == 3 else weights[:, None, None]) * valid
    entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE_INDEX, reduction="none")
    loss = (entropy * pixel_weights).sum() / pixel_weights.sum().clamp_min(1e-6)
    if dice_weight:
        loss = loss + dice_weight * _soft_dice(logits, target, pixel_weights)
    return loss


def _soft_dice(logits: Tensor, target: Tensor, pixel_weights: Tensor) -> Tensor:
    """1 - Dice, mean over the foreground classes present in `target`; counts are summed over the batch."""
    probs = logits.float().softmax(dim=1)[:, 1:]
    classes = torch.arange(1, logits.shape[1], device=target.device)[None, :, None, None]
    truth = (target[:, None] == classes).float()
    w = pixel_weights[:, None]
    overlap = (probs * truth * w).sum(dim=(0, 2, 3))
    total = ((probs + truth) * w).sum(dim=(0, 2, 3))
    present = (truth * w).sum(dim=(0, 2, 3)) > 0
    scores = 1 - (2 * overlap + 1e-6) / (total + 1e-6)
    return (scores * present).sum() / present.sum().clamp_min(1)
