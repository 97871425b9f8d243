"""Teaching SAM's mask decoder on embeddings at hand: what is learnt, and the loss.

Legend: H, W the image's own frame; S the side of the decoder's logits, padded to a square; h, w the part of S x S that
the image takes; B lessons of one decoder call.

The loss is that of Kirillov et al. 2023, "Segment Anything", appendix A: focal and Dice loss of the mask in the ratio
20 : 1, and the squared error of the predicted IoU with weight 1. The paper names no alpha and gamma; ours, 0.25 and 2,
are those of MaskFormer, which it follows, and of SAM 2's published training. Ours, too: one mask a prompt (the paper
teaches three, of which the best learns), and the frame in which the IoU is measured, see `_iou`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from kmine.segmenters.base import PromptedExample

if TYPE_CHECKING:
    from kmine.segmenters.sam.segmenter import DecoderQuery, SamSegmenter

DECODER = "mask_decoder."
"""What the keys of a state open with, as in a checkpoint of the whole SAM."""
FOCAL_WEIGHT = 20.0
FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


class SamFineTuner:
    """A `FineTuner` whose mask decoder learns. The image encoder is never run; the prompt encoder runs, but is frozen."""

    def __init__(self, segmenter: SamSegmenter) -> None:
        """Takes a segmenter with a decoder that nobody else uses; nobody may ask for its signature, it changes."""
        self._segmenter = segmenter
        segmenter.decoder.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """Those of the mask decoder."""
        return list(self._segmenter.decoder.parameters())

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the decoder's tensors, named as in a checkpoint of the whole SAM."""
        tensors = self._segmenter.decoder.state_dict()
        return {f"{DECODER}{key}": tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """The mean loss over lessons, a scalar with gradient.

        Prompts are taken as they are: box, points and hint; jittered boxes teach nothing. An empty mask teaches the
        predicted IoU alone, towards 0.

        Args:
            examples: at least one.
            seed: unused. An augmented image would have to be encoded again, which is what the embedding saves; variety
                comes from the prompts that the caller draws.

        Raises:
            ValueError: features of another model, prompts that do not fit their image, a mask of another size.
        """
        calls: dict[tuple[int, object], list[tuple[PromptedExample, DecoderQuery]]] = {}
        for example in examples:
            _check_mask(example)
            query = next(self._segmenter.queries(0, example.prompts, example.embedding.size))
            # The official decoder takes one image a call; prompts of one form share it.
            calls.setdefault((id(example.embedding), query.form), []).append((example, query))
        return torch.cat([self._losses(*zip(*call, strict=True)) for call in calls.values()]).mean()

    def _losses(self, examples: Sequence[PromptedExample], queries: Sequence[DecoderQuery]) -> Tensor:
        """(B,) losses of lessons on one embedding, with prompts of one form."""
        embedding = examples[0].embedding
        low_res, score = self._segmenter.low_res(
            self._segmenter.features(embedding), embedding.size, queries, multimask=False
        )
        truth = torch.from_numpy(np.stack([example.mask for example in examples])).to(low_res.device)
        height, width = self._segmenter.unpadded(embedding.size)
        # The share of each low-resolution pixel that is object: not even the thinnest object is lost.
        share = F.interpolate(truth[:, None].float(), (height, width), mode="area").flatten(1)
        logits = low_res[:, 0, :height, :width].flatten(1)
        of_mask = FOCAL_WEIGHT * focal_loss(logits, share) + dice_loss(logits, share)
        of_score = (score[:, 0] - self._iou(low_res, truth)) ** 2
        return torch.where(truth.flatten(1).any(1), of_mask, 0.0) + of_score

    @torch.no_grad()
    def _iou(self, low_res: Tensor, truth: Tensor) -> Tensor:
        """(B,) IoU of the answers with (B, H, W) truth, 0 for an empty one.

        Measured on the mask that `decode` would return, in the image's frame: that is what the gate takes a predicted
        IoU for, and a small object would lose a good part of its IoU to the coarse pixels of the logits.
        """
        predicted = self._segmenter.upscaled(low_res, truth.shape[-2:])[:, 0] > Sam.mask_threshold
        either = (predicted | truth).flatten(1).sum(1)
        return (predicted & truth).flatten(1).sum(1) / either.clamp_min(1)


def focal_loss(logits: Tensor, share: Tensor) -> Tensor:
    """(B,) focal loss (Lin et al. 2017), mean over pixels, of (B, pixels) logits; `share` is the truth in [0, 1]."""
    prob = logits.sigmoid()
    right = prob * share + (1 - prob) * (1 - share)
    alpha = FOCAL_ALPHA * share + (1 - FOCAL_ALPHA) * (1 - share)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
    return (alpha * (1 - right) ** FOCAL_GAMMA * cross_entropy).mean(1)


def dice_loss(logits: Tensor, share: Tensor) -> Tensor:
    """(B,) Dice loss in [0, 1] of (B, pixels) logits and truth in [0, 1]; 1 added above and below as in MaskFormer."""
    prob = logits.sigmoid()
    return 1 - (2 * (prob * share).sum(1) + 1) / (prob.sum(1) + share.sum(1) + 1)


def _check_mask(example: PromptedExample) -> None:
    # Resizing would take a mask of any size, a transposed one without a word.
    if example.mask.shape != example.embedding.size:
        raise ValueError(
            f"lesson: expected a mask of the image's own (H, W) = {example.embedding.size}, got {example.mask.shape}; "
            "give the mask in the image's frame"
        )
