"""How `tiny` learns: its loss, the change of looks, and the trainee that is taught on labeled images.

Legend: B crops, S side of a crop, P points, all in the crop's frame (`crop.py`); H, W the image's own frame.

The first training, on procedural images, uses the same loss and looks (`experiments/tiny_segmenter`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from kmine.segmenters.base import PromptedExample
from kmine.segmenters.tiny.crops import (
    DecoderQuery,
    decoder_queries,
    network_input,
    valid_region,
)
from kmine.segmenters.tiny.network import (
    NetworkInput,
    TinyNet,
    ellipse_logits,
    planes_of,
)

SCORE_WEIGHT = 2.0
"""Of the predicted IoU's squared error, beside BCE and Dice."""
AUGMENT_STRENGTH = 0.3
"""Strength of `repainted` for labeled images: they look like those to come, unlike procedural ones."""
MASK_INPUT_DROPOUT = 0.3
"""Of the hints, the share that is withheld, so that the segmenter still answers those who give none."""


def predict_masks(net: TinyNet, inputs: NetworkInput) -> tuple[Tensor, Tensor]:
    """Mask logits (B, 1, S, S) and predicted IoU (B,) in [0, 1], with gradient."""
    added, score = net(planes_of(inputs).contiguous(memory_format=torch.channels_last))
    return ellipse_logits(inputs.boxes, net.side, net.side) + added, score


def iou_of(mask: Tensor, truth: Tensor, unseen: Tensor | float = 0.0) -> Tensor:
    """(B,) IoU of (B, 1, S, S) masks in {0, 1}; 0 for two empty ones.

    Args:
        mask: answered.
        truth: as far as the crop shows it.
        unseen: (B,) area of the true objects outside the crop, in pixels of the crop: missed, whatever the answer.
    """
    both = (mask * truth).sum((1, 2, 3))
    return both / (mask.sum((1, 2, 3)) + truth.sum((1, 2, 3)) - both + unseen).clamp_min(1)


def tiny_loss(logits: Tensor, score: Tensor, truth: Tensor, unseen: Tensor | float = 0.0) -> Tensor:
    """BCE + soft Dice + squared error of the predicted IoU, the mean over B crops, a scalar.

    A crop with an empty truth teaches its predicted IoU alone, towards 0: what object was meant, nobody can say.

    Args:
        logits: (B, 1, S, S) of the mask.
        score: (B,) predicted IoU.
        truth: (B, 1, S, S) in [0, 1], the share of a pixel that is object; the IoU counts it from a half on.
        unseen: see `iou_of`.
    """
    has_object = (truth.sum((1, 2, 3)) > 0).to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, truth, weight=has_object[:, None, None, None])
    prob = logits.sigmoid()
    overlap = 2 * (prob * truth).sum((1, 2, 3)) + 1
    dice = 1 - overlap / (prob.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)
    true_iou = iou_of((logits.detach() > 0).float(), (truth >= 0.5).float(), unseen)
    return bce + (dice * has_object).mean() + SCORE_WEIGHT * F.mse_loss(score, true_iou)


class TinyFineTuner:
    """A `FineTuner` around a `TinyNet` that nobody else uses; every weight learns."""

    def __init__(self, net: TinyNet, *, name: str, device: torch.device | str) -> None:
        """Takes a network, on `device` already; `name` is its segmenter's, for errors."""
        self._net = net.requires_grad_(True)
        self._name = name
        self._device = device

    def parameters(self) -> list[nn.Parameter]:
        """All of the network's."""
        return list(self._net.parameters())

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """The mean of `tiny_loss` over the lessons, a scalar with gradient.

        Each is asked as `Tiny.decode` would ask it, turned and repainted, some without their hint, see `augmented`.
        Jittered boxes teach nothing.

        Args:
            examples: at least one.
            seed: of the augmentation, which is drawn on the CPU: the same on every device.

        Raises:
            UserError: prompts without a box.
            ValueError: no lessons, embeddings of another segmenter, prompts that do not fit their image, a mask of
                another size than the image.
        """
        if not examples:
            raise ValueError("lessons: expected at least one, got none")
        queries = [self._query(example) for example in examples]
        truths = [truth_of(query, example.mask) for query, example in zip(queries, examples, strict=True)]
        truth = torch.from_numpy(np.stack([crop for crop, _ in truths]))[:, None]
        unseen = torch.tensor([area for _, area in truths], dtype=torch.float32)
        inputs, truth = augmented(network_input(queries, "cpu"), truth, torch.Generator().manual_seed(seed))
        inputs = NetworkInput(*(tensor.to(self._device) for tensor in inputs))
        return tiny_loss(*predict_masks(self._net, inputs), truth.to(self._device), unseen.to(self._device))

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all tensors, laid out so that safetensors takes them."""
        # The network keeps its weights channels last, which safetensors refuses.
        return {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in self._net.state_dict().items()
        }

    def _query(self, example: PromptedExample) -> DecoderQuery:
        if example.mask.shape != example.embedding.size:
            raise ValueError(
                f"lesson: expected a mask of the image's own (H, W) = {example.embedding.size}, "
                f"got {example.mask.shape}; leave masks and images at their own size"
            )
        return next(decoder_queries(example.embedding, example.prompts, side=self._net.side, name=self._name))


def truth_of(query: DecoderQuery, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], float]:
    """What the crop of a row shows of an object, and how much it does not.

    Args:
        query: with its window.
        mask: (H, W).

    Returns:
        (S, S) in [0, 1], the share of each pixel that is object, 0 beyond the image; and the area outside the crop in
        pixels of the crop.
    """
    window = query.window
    crop = np.where(valid_region(query), window.take(mask.astype(np.float32)), np.float32(0))
    shown = mask[max(window.top, 0) : window.top + window.height, max(window.left, 0) : window.left + window.width]
    unseen = np.count_nonzero(mask) - np.count_nonzero(shown)
    return crop, float(unseen) * window.side**2 / (window.width * window.height)


def augmented(inputs: NetworkInput, truth: Tensor, rng: Generator) -> tuple[NetworkInput, Tensor]:
    """Questions and truths (B, 1, S, S), each turned at random, looking a little different, some without their hint."""
    count = len(truth)
    inputs, truth = turned(inputs, truth, *(torch.rand(3, count, generator=rng) < 0.5))
    kept = (torch.rand(count, generator=rng) >= MASK_INPUT_DROPOUT).float()
    image = repainted(inputs.image, rng, AUGMENT_STRENGTH)
    return inputs._replace(
        image=image,
        mask_input=inputs.mask_input * kept[:, None, None, None],
        has_mask_input=inputs.has_mask_input * kept,
    ), truth


def turned(
    inputs: NetworkInput, truth: Tensor, across: Tensor, down: Tensor, swap: Tensor
) -> tuple[NetworkInput, Tensor]:
    """Questions and truths mirrored, then transposed; image, prompts and truth stay together.

    Args:
        inputs: B questions.
        truth: (B, 1, S, S).
        across: (B,) bool, which are mirrored from left to right.
        down: (B,) bool, which are mirrored from top to bottom.
        swap: (B,) bool, which have rows and columns exchanged after that.
    """
    side = truth.shape[-1]
    mirrored = torch.stack([across, down], 1)[:, None]  # (B, 1, x or y)

    def picture(plane: Tensor) -> Tensor:
        for selected, transform in ((across, lambda x: x.flip(3)), (down, lambda x: x.flip(2)), (swap, lambda x: x.mT)):
            plane = torch.where(selected[:, None, None, None], transform(plane), plane)
        return plane

    def points(at: Tensor) -> Tensor:
        at = torch.where(mirrored, side - 1 - at, at)
        return torch.where(swap[:, None, None], at.flip(2), at)

    def boxes(edges: Tensor) -> Tensor:
        corners = points(edges.reshape(-1, 2, 2))
        return torch.cat([corners.amin(1), corners.amax(1)], 1)

    inputs = inputs._replace(
        image=picture(inputs.image),
        limits=boxes(inputs.limits),
        boxes=boxes(inputs.boxes),
        points=points(inputs.points),
        mask_input=picture(inputs.mask_input),
    )
    return inputs, picture(truth)


def repainted(image: Tensor, rng: Generator, strength: float = 1.0) -> Tensor:
    """Other gains, gamma, less colour, inverted, uneven light, blur and noise.

    Args:
        image: (B, 3, S, S) in [0, 255].
        rng: on the image's device.
        strength: in [0, 1]; 1 suits made-up pictures, 0 changes nothing that can be seen. Up to a half no picture
            loses its colour or is inverted.

    Returns:
        (B, 3, S, S) in [0, 255].
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=image.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=image.device)

    count, side, drastic = len(image), image.shape[-1], max(2 * strength - 1, 0.0)
    x = image / 255
    grey = (uniform(count, 1, 1, 1) < 0.25 * drastic).float() * uniform(count, 1, 1, 1) ** 0.3
    x = x + grey * (x.mean(1, keepdim=True) - x)
    x = torch.where(uniform(count, 1, 1, 1) < 0.12 * drastic, 1 - x, x)
    x = x.clamp(1e-3, 1) ** (0.3 * strength * normal(count, 1, 1, 1)).exp()
    field = F.interpolate(normal(count, 1, 3, 3), (side, side), mode="bicubic", align_corners=False)
    x = x * (0.1 * strength * field + 0.12 * strength * normal(count, 3, 1, 1)).exp()
    soft = F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    x = x + uniform(count, 1, 1, 1).sub(0.5).clamp_min(0) * 2 * strength * (soft - x)
    noise = 0.06 * strength * uniform(count, 1, 1, 1) ** 2 * normal(*x.shape)
    return (x + noise).clamp(0, 1) * 255
