"""Fine-tuning of SAM's mask decoder on precomputed embeddings; B examples share a decoder call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from kmine.segmenters.base import PromptedExample, check_example
from kmine.segmenters.batched import DecoderQuery
from kmine.segmenters.sam.decoder import PromptDecoder

# The loss is that of Kirillov et al. 2023, "Segment Anything", appendix A: focal and Dice loss of the mask, 20 : 1, and
# the squared error of the predicted IoU, weight 1. The paper gives no alpha and gamma; these are those of MaskFormer,
# which it follows, and of SAM 2. Two differences: one mask a prompt (the paper: the best of three), and the frame in
# which the IoU is measured, see `_iou`.
FOCAL_WEIGHT = 20.0
FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


class SamFineTuner:
    """A `FineTuner` of the mask decoder. The image encoder does not run; the prompt encoder runs, but is frozen."""

    def __init__(self, decoder: PromptDecoder) -> None:
        """Take a decoder that nothing else uses."""
        self._decoder = decoder
        decoder.mask_decoder.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the mask decoder."""
        return list(self._decoder.mask_decoder.parameters())

    def state(self) -> dict[str, Tensor]:
        """See `PromptDecoder.state`."""
        return self._decoder.state()

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """Mean loss over at least one example, a scalar with gradient; jittered boxes are ignored.

        An empty mask has a loss of the predicted IoU only, whose target is 0. `seed` is unused: an augmented image
        would have to be encoded again; the variety is in the prompts that the caller draws.

        Raises:
            ValueError: features of another model, prompts that do not fit their image, a mask of another size.
        """
        calls: dict[tuple[int, object], list[tuple[PromptedExample, DecoderQuery]]] = {}
        for example in examples:
            check_example(example)
            query = next(self._decoder.queries(0, example.prompts, example.embedding.size))
            # The official decoder takes one image a call; prompts of one form share it.
            calls.setdefault((id(example.embedding), query.form), []).append((example, query))
        return torch.cat([self._losses(*zip(*call, strict=True)) for call in calls.values()]).mean()

    def _losses(self, examples: Sequence[PromptedExample], queries: Sequence[DecoderQuery]) -> Tensor:
        """(B,) losses of examples on one embedding, with prompts of one form."""
        embedding, decoder = examples[0].embedding, self._decoder
        low_res, score = decoder.low_res(decoder.features(embedding), embedding.size, queries, multimask=False)
        truth = torch.from_numpy(np.stack([example.mask for example in examples])).to(low_res.device)
        height, width = decoder.unpadded(embedding.size)
        # The object's share of each low-resolution pixel: thin objects are not lost.
        share = F.interpolate(truth[:, None].float(), (height, width), mode="area").flatten(1)
        logits = low_res[:, 0, :height, :width].flatten(1)
        of_mask = FOCAL_WEIGHT * focal_loss(logits, share) + dice_loss(logits, share)
        of_score = (score[:, 0] - self._iou(low_res, truth)) ** 2
        return torch.where(truth.flatten(1).any(1), of_mask, 0.0) + of_score

    @torch.no_grad()
    def _iou(self, low_res: Tensor, truth: Tensor) -> Tensor:
        """(B,) IoU of predicted masks with (B, H, W) truth, 0 for an empty one.

        Measured in the image's frame, on the mask that `decode` returns, since the gate reads the predicted IoU so; a
        small object would lose much of its IoU to the coarse pixels of the logits.
        """
        predicted = self._decoder.upscaled(low_res, truth.shape[-2:])[:, 0] > Sam.mask_threshold
        either = (predicted | truth).flatten(1).sum(1)
        return (predicted & truth).flatten(1).sum(1) / either.clamp_min(1)


def focal_loss(logits: Tensor, share: Tensor) -> Tensor:
    """(B,) focal loss (Lin et al. 2017), mean over pixels, of (B, pixels) logits and truth `share` in [0, 1]."""
    prob = logits.sigmoid()
    right = prob * share + (1 - prob) * (1 - share)
    alpha = FOCAL_ALPHA * share + (1 - FOCAL_ALPHA) * (1 - share)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
    return (alpha * (1 - right) ** FOCAL_GAMMA * cross_entropy).mean(1)


def dice_loss(logits: Tensor, share: Tensor) -> Tensor:
    """(B,) Dice loss in [0, 1] of (B, pixels) logits and truth in [0, 1], smoothed by 1 as in MaskFormer."""
    prob = logits.sigmoid()
    return 1 - (2 * (prob * share).sum(1) + 1) / (prob.sum(1) + share.sum(1) + 1)
