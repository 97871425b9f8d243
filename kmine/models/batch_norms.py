"""Batch norms of pretrained encoders: whether they were folded into the convolutions; restoration from images.

A deployment file folds each norm into the convolution before it: `running_mean` 0, `running_var` 1, `weight` 1, and all
of the function in convolution and `bias`. In evaluation such a network is right. In training a norm divides by the
deviation of the batch, so the folded scale is lost and the features are scrambled at the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kmine.models.base import LocalModel

MIN_FOLDED = 0.9
"""Share of identity norms from which on a file counts as folded."""
CLEAR = 0.7
"""A scaling is measured if the features disagree at most this share as much as under the next one."""
_TOLERANCE = 1e-3
_BATCH = 16
_MAX_VALUES = 2**21
"""Features of a stride that are compared, evenly spaced."""


def folded_norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    """Norms that were folded into their convolutions; empty for a healthy or an untrained encoder."""
    norms = _norms(encoder)
    found = [n for n in norms if _has_no_statistics(n) and bool(((n.weight - 1).abs() < _TOLERANCE).all())]
    biased = [norm for norm in found if norm.bias.abs().max() > _TOLERANCE]
    return found if norms and len(found) >= MIN_FOLDED * len(norms) and len(biased) > len(found) / 2 else []


def is_untrained(encoder: nn.Module) -> bool:
    """Whether all norms have the values of initialization, as in a file of a network that was never trained."""
    norms = _norms(encoder)
    return bool(norms) and all(_has_no_statistics(norm) and not norm.bias.any() for norm in norms)


@torch.no_grad()
def restore_norms(model: LocalModel, images: NDArray[np.uint8]) -> None:
    """Give the folded norms of the encoders the statistics of their inputs.

    One evaluation pass over `images`, (N, S, S, 3) RGB in [0, 255], yields mean and variance of every norm's input;
    weight and bias undo them, so that the evaluation function stays the same. The model, on the CPU, is left in
    training mode.
    """
    model.eval()
    for encoder in model.encoders():
        sums: dict[nn.Module, list[Tensor]] = {}

        def add(norm: nn.Module, args: tuple[Tensor, ...], sums: dict[nn.Module, list[Tensor]] = sums) -> None:
            x = args[0].double()
            own = [x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), torch.tensor(x.numel() / x.shape[1])]
            sums[norm] = [a + b for a, b in zip(sums.get(norm, (0, 0, 0)), own, strict=True)]

        hooks = [norm.register_forward_pre_hook(add) for norm in folded_norms(encoder)]
        for first in range(0, len(images), _BATCH):
            encoder(_input(model, images[first : first + _BATCH]))
        for hook in hooks:
            hook.remove()
        for norm, (total, squares, number) in sums.items():
            mean = total / number
            variance = (squares / number - mean.square()).clamp(min=0)
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            norm.bias.copy_(norm.bias.double() + scale * (mean - norm.running_mean.double()))
            norm.weight.copy_(scale * (variance + norm.eps).sqrt())
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    model.train()


@torch.no_grad()
def feature_agreement(model: LocalModel, images: NDArray[np.uint8]) -> dict[int, float]:
    """Correlation of the features in training and in evaluation mode, by stride; the lower one of two encoders.

    Empty without batch norms, which alone differ much between the modes. `images` are (N, S, S, 3) RGB in [0, 255].
    Features without variation correlate by 0. The model, its running statistics and torch's generator are not changed.
    """
    agreement: dict[int, float] = {}
    x = _input(model, images)
    with torch.random.fork_rng(devices=[]):
        for encoder in map(copy.deepcopy, filter(_norms, model.encoders())):
            for a, b in zip(*(list(encoder.train(mode)(x)) for mode in (False, True)), strict=True):
                stride = x.shape[-1] // max(1, a.shape[-1])
                if a.numel() and stride > 1:
                    step = (a.numel() // _MAX_VALUES) | 1
                    pair = torch.stack([a.flatten()[::step], b.flatten()[::step]]).double()
                    value = float(torch.corrcoef(pair)[0, 1].nan_to_num()) if bool((pair.std(1) > 0).all()) else 0.0
                    agreement[stride] = min(value, agreement.get(stride, 1.0))
    return agreement


def scaling_agreement(model: LocalModel, images: NDArray[np.uint8], names: Iterable[str]) -> dict[str, float]:
    """`feature_agreement` at the finest stride under each input scaling; empty without trained batch norms.

    Running statistics fit those of a batch best under the scaling of the weights. Correlation stands grey images and
    other contrasts, where moments of the first norm do not. The scaling of the model is changed.
    """
    norms, agreement = _norms(model.encoders()[0]), {}
    for name in names if norms and not _has_no_statistics(norms[0]) else ():
        model.set_scaling(name)
        agreement[name] = next(iter(feature_agreement(model, images).values()))
    return agreement


def clear_scaling(agreement: dict[str, float]) -> str | None:
    """The scaling of the highest agreement if it is clearly above the next one, else None."""
    ranked = sorted(agreement, key=lambda name: -agreement[name])
    is_clear = len(ranked) > 1 and 1 - agreement[ranked[0]] <= CLEAR * (1 - agreement[ranked[1]])
    return ranked[0] if is_clear else None


def _norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) and m.affine and m.track_running_stats]


def _has_no_statistics(norm: nn.BatchNorm2d) -> bool:
    return not norm.running_mean.any() and bool(((norm.running_var - 1).abs() < _TOLERANCE).all())


def _input(model: LocalModel, images: NDArray[np.uint8]) -> Tensor:
    return model.prepare(torch.from_numpy(images).permute(0, 3, 1, 2))
