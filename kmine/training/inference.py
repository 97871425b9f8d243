"""Inference of the local model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmine.data.pool import Pool
from kmine.models.base import LocalModel
from kmine.types import Probs

_FLIPS: dict[str, list[list[int]]] = {"none": [[]], "hflip": [[], [-1]], "flips": [[], [-1], [-2], [-2, -1]]}


def resized_batches(pool: Pool, ids: Sequence[str], size: int) -> Iterator[tuple[Sequence[str], NDArray[np.uint8]]]:
    """The images `ids` at training size, at most `size` at a time: their ids and (B, S, S, 3) uint8 RGB."""
    for first in range(0, len(ids), size):
        batch = ids[first : first + size]
        yield batch, np.stack([pool.image_resized(i) for i in batch])


def infer(
    model: LocalModel, pool: Pool, ids: Sequence[str], *, batch_size: int, tta: str, device: torch.device
) -> Iterator[Probs]:
    """Class probabilities of the images `ids`, in order, each (K, H, W) in the image's own frame.

    Predicted at the square training size, `batch_size` at a time, averaged over the flips `tta` (none, hflip or flips),
    and resized (bilinear). `model`, on `device`, is set to eval mode.

    Raises:
        FloatingPointError: NaN or infinite logits.
    """
    model.eval()
    for batch, images in resized_batches(pool, ids, batch_size):
        probs, std = predict_resized(model, images, tta, device)
        for sample_id, p, s in zip(batch, probs, std, strict=True):
            std_native = None if tta == "none" else pool.in_frame(s, sample_id)[0]
            yield Probs(sample_id, pool.in_frame(p, sample_id), std_native)


@torch.inference_mode()
def activations(
    model: LocalModel, pool: Pool, ids: Sequence[str], *, batch_size: int, device: torch.device
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Class activation maps of an `SksModel`: (id, (H, W) in [0, 1] in the image's own frame); arguments as `infer`."""
    model.eval()
    for batch, images in resized_batches(pool, ids, batch_size):
        maps = model.activation_map(image_tensor(images, device)).float().cpu().numpy()
        for sample_id, cam in zip(batch, maps, strict=True):
            yield sample_id, pool.in_frame(cam[None], sample_id)[0]


@torch.inference_mode()
def predict_resized(
    model: LocalModel, images: NDArray[np.uint8], tta: str, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class probabilities at training size; `model` should be in eval mode. `FloatingPointError` as `infer`.

    (B, S, S, 3) uint8 RGB -> (B, K, S, S) means over the flips `tta`, (B, 1, S, S) standard deviation of foreground.
    """
    x, flips = image_tensor(images, device), _FLIPS[tta]
    flipped = torch.cat([x.flip(dims) for dims in flips])  # one forward pass on a GPU
    at_once = len(x) if device.type == "cpu" else len(flipped)
    logits = torch.cat([model(part) for part in flipped.split(at_once)])
    pairs = zip(logits.float().softmax(dim=1).chunk(len(flips)), flips, strict=True)
    views = torch.stack([view.flip(dims) for view, dims in pairs])
    if not torch.isfinite(views).all():
        raise FloatingPointError("the local model gave NaN or infinite logits; lower fit.lr or use fit.precision 32")
    std = (1 - views[:, :, :1]).std(dim=0, unbiased=False)
    return views.mean(dim=0).cpu().numpy(), std.cpu().numpy()


def image_tensor(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, S, S, 3) -> (B, 3, S, S) on `device`."""
    return torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
