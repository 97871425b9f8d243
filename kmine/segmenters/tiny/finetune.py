"""Fine-tuning of `tiny`: loss, augmentation, and the trainable copy; B crops of side S in the crop's frame.

Pretraining on procedural images (`experiments/tiny_segmenter`) uses the same loss and colour augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from kmine.segmenters.base import PromptedExample, check_example
from kmine.segmenters.tiny.crops import CropQuery, crop_queries, network_input, valid_region
from kmine.segmenters.tiny.network import NetworkInput, TinyNet, ellipse_logits, planes_of

SCORE_WEIGHT = 2.0
"""Weight of the predicted IoU's squared error; BCE and Dice have weight 1."""
AUGMENT_STRENGTH = 0.3
"""Strength of `color_jitter` for labeled images, which resemble the images to segment more than procedural ones do."""
MASK_INPUT_DROPOUT = 0.3
"""Share of mask inputs that are left out, so that the segmenter also works without one."""


def predict_masks(net: TinyNet, inputs: NetworkInput) -> tuple[Tensor, Tensor]:
    """Mask logits (B, 1, S, S) and predicted IoU (B,) in [0, 1], with gradient."""
    added, score = net(planes_of(inputs).contiguous(memory_format=torch.channels_last))
    return ellipse_logits(inputs.boxes, net.side, net.side) + added, score


def iou_of(mask: Tensor, truth: Tensor, area_outside: Tensor | float = 0.0) -> Tensor:
    """(B,) IoU of (B, 1, S, S) masks in {0, 1}; 0 for two empty ones.

    `area_outside` (B,) is that of the true objects outside the crop, in pixels of the crop: no prediction covers it.
    """
    both = (mask * truth).sum((1, 2, 3))
    return both / (mask.sum((1, 2, 3)) + truth.sum((1, 2, 3)) - both + area_outside).clamp_min(1)


def tiny_loss(logits: Tensor, score: Tensor, truth: Tensor, area_outside: Tensor | float = 0.0) -> Tensor:
    """BCE + soft Dice + squared error of the predicted IoU, the mean over B crops, a scalar.

    `logits` are (B, 1, S, S), `score` (B,) predicted IoU. `truth` is (B, 1, S, S) in [0, 1], the object's share of a
    pixel; the IoU counts pixels of at least 1/2, and `area_outside` as in `iou_of`. A crop with an empty truth has a
    loss of the predicted IoU only, whose target is 0.
    """
    has_object = (truth.sum((1, 2, 3)) > 0).to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, truth, weight=has_object[:, None, None, None])
    prob = logits.sigmoid()
    overlap = 2 * (prob * truth).sum((1, 2, 3)) + 1
    dice = 1 - overlap / (prob.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)
    true_iou = iou_of((logits.detach() > 0).float(), (truth >= 0.5).float(), area_outside)
    return bce + (dice * has_object).mean() + SCORE_WEIGHT * F.mse_loss(score, true_iou)


class TinyFineTuner:
    """A `FineTuner` of all weights of a `TinyNet`."""

    def __init__(self, net: TinyNet, *, name: str, device: torch.device | str) -> None:
        """Take a network on `device` that nothing else uses; `name` is its segmenter's, for errors."""
        self._net = net.requires_grad_(True)
        self._name = name
        self._device = device

    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self._net.parameters())

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """Mean `tiny_loss` over at least one example, a scalar with gradient; jittered boxes are ignored.

        The network's input is that of `Tiny.decode`, augmented on the CPU: the same for a `seed` on every device.

        Raises:
            UserError: prompts without a box.
            ValueError: no examples, embeddings of another segmenter, prompts that do not fit their image, a mask of
                another size than the image.
        """
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        for example in examples:
            check_example(example)
        settings = {"side": self._net.side, "name": self._name}
        queries = [next(crop_queries(example.embedding, example.prompts, **settings)) for example in examples]
        truths = [truth_in_crop(query, example.mask) for query, example in zip(queries, examples, strict=True)]
        truth = torch.from_numpy(np.stack([crop for crop, _ in truths]))[:, None]
        area_outside = torch.tensor([area for _, area in truths], dtype=torch.float32)
        inputs, truth = augment(network_input(queries, "cpu"), truth, torch.Generator().manual_seed(seed))
        inputs = NetworkInput(*(tensor.to(self._device) for tensor in inputs))
        return tiny_loss(*predict_masks(self._net, inputs), truth.to(self._device), area_outside.to(self._device))

    def state(self) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU."""
        # The weights are channels last, which safetensors refuses.
        tensors, order = self._net.state_dict(), torch.contiguous_format
        return {key: tensor.detach().cpu().clone(memory_format=order) for key, tensor in tensors.items()}


def truth_in_crop(query: CropQuery, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], float]:
    """A row's part of an (H, W) mask: (S, S) in [0, 1], the object's share of each pixel, 0 beyond the image.

    Also the object's area outside the crop, in pixels of the crop.
    """
    window = query.window
    crop = np.where(valid_region(query), window.crop(mask.astype(np.float32)), np.float32(0))
    area_outside = np.count_nonzero(mask) - np.count_nonzero(mask[window.visible(mask.shape)])
    return crop, float(area_outside) * window.side**2 / (window.width * window.height)


def augment(inputs: NetworkInput, truth: Tensor, rng: Generator) -> tuple[NetworkInput, Tensor]:
    """Inputs and truth (B, 1, S, S), randomly flipped and transposed, recoloured, some without their mask input."""
    count = len(truth)
    inputs, truth = flip_and_transpose(inputs, truth, *(torch.rand(3, count, generator=rng) < 0.5))
    kept = (torch.rand(count, generator=rng) >= MASK_INPUT_DROPOUT).float()
    image = color_jitter(inputs.image, rng, AUGMENT_STRENGTH)
    mask_input, has_mask_input = inputs.mask_input * kept[:, None, None, None], inputs.has_mask_input * kept
    return inputs._replace(image=image, mask_input=mask_input, has_mask_input=has_mask_input), truth


def flip_and_transpose(
    inputs: NetworkInput, truth: Tensor, across: Tensor, down: Tensor, swap: Tensor
) -> tuple[NetworkInput, Tensor]:
    """Flip and transpose image, prompts and truth (B, 1, S, S) together.

    Each (B,) bool: `across` flips left to right, `down` top to bottom, `swap` transposes after that.
    """
    side = truth.shape[-1]
    mirrored = torch.stack([across, down], 1)[:, None]  # (B, 1, x or y)

    def planes(plane: Tensor) -> Tensor:
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
        image=planes(inputs.image),
        limits=boxes(inputs.limits),
        boxes=boxes(inputs.boxes),
        points=points(inputs.points),
        mask_input=planes(inputs.mask_input),
    )
    return inputs, planes(truth)


def color_jitter(image: Tensor, rng: Generator, strength: float = 1.0) -> Tensor:
    """Random gains, gamma, desaturation, inversion, uneven light, blur and noise on (B, 3, S, S) in [0, 255].

    `rng` is on the image's device. `strength` is in [0, 1]: 1 for procedural images, 0 for no visible change; up to 1/2
    no image is desaturated or inverted.
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
