"""Pool to training batches: crops around jittered boxes, looks changed, prompts as bad as real ones.

Legend: B pairs, V side of a view (`generate.VIEW`), S side of a crop. Everything after the gathering runs in torch on
the training device; all chance comes from the generator that is passed in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from generate import VIEW
from torch import Generator, Tensor

from kmine.segmenters.base import MASK_INPUT_CLIP
from kmine.segmenters.tiny.finetune import color_jitter
from kmine.segmenters.tiny.network import NetworkInput
from kmine.segmenters.tiny.window import MARGIN, MAX_ASPECT, MIN_WINDOW

MAX_JITTER = 0.15
"""Each edge of a box moves by up to this share of its side; how much, is drawn for every box."""
HINT_SHARE = 0.5
POINT_SHARE = 0.35
"""Of the pairs that get a positive point, and independently a negative one."""


class Pool:
    """The shards of a folder, memory-mapped."""

    def __init__(self, folder: Path, first: int = 0, stop: int | None = None) -> None:
        """Shards `first` to `stop`, of those that are there."""
        paths = sorted(folder.glob("views_*.npy"))[first:stop]
        if not paths:
            raise SystemExit(f"{folder}: expected at least two shards; draw some with generate.py {folder}")
        self._views = [np.load(path, mmap_mode="r") for path in paths]
        self._meta = np.concatenate([np.load(path.with_name(path.name.replace("views", "meta"))) for path in paths])
        self._per_shard = len(self._views[0])

    def __len__(self) -> int:
        return len(self._meta)

    def gather(self, indices: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(B, 4, V, V) float in [0, 255] and (B, META)."""
        views = np.stack([self._views[i // self._per_shard][i % self._per_shard] for i in indices])
        planes = torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float()
        return planes, torch.from_numpy(self._meta[indices]).to(device)


def make_batch(
    views: Tensor, meta: Tensor, side: int, rng: Generator, train: bool = True
) -> tuple[NetworkInput, Tensor]:
    """Pairs to questions and their truth, (B, 1, S, S) in {0, 1}.

    With `train` false: boxes jittered by 5 %, nothing else changed, no points and no hints.
    """
    if train:
        views, meta = _turned(views, meta, rng)
    boxes = _jittered(meta, rng, MAX_JITTER if train else None)
    crops, placed, limits = _cropped(views, boxes, meta, side)
    image, truth = crops[:, :3], (crops[:, 3:] > 127.5).float()
    count = len(image)
    hint, has_hint = truth.new_zeros(truth.shape), truth.new_zeros(count)
    points, labels = truth.new_zeros(count, 0, 2), torch.zeros(count, 0, dtype=torch.long, device=truth.device)
    if train:
        image = color_jitter(image, rng)
        rough = _degraded(truth, rng)
        has_hint = (_uniform(rng, truth, count) < HINT_SHARE).float()
        hint = rough * has_hint[:, None, None, None]
        points, labels = _points(rough, placed, rng)
    return NetworkInput(image, limits, placed, points, labels, hint, has_hint), truth


def corrected(asked: NetworkInput, truth: Tensor, logits: Tensor, rng: Generator) -> NetworkInput:
    """The question again with a point where the answer was wrong, and for half of them the answer as a hint."""
    wrong = ((logits > 0).float() != truth).float()
    # Blurred, so that the middle of a fault is likelier than its rim.
    where = F.avg_pool2d(wrong, 7, 1, 3) * (0.3 + 0.7 * _uniform(rng, truth, *truth.shape)) * wrong
    point, found = _peak(where)
    label = truth.flatten(1).gather(1, where.flatten(1).argmax(1, keepdim=True)).long()
    label = torch.where(found[:, None], label, -1)
    again = (_uniform(rng, truth, len(truth)) < 0.5).float()
    kept = again[:, None, None, None]
    return asked._replace(
        points=torch.cat([asked.points, point[:, None]], 1),
        point_labels=torch.cat([asked.point_labels, label], 1),
        mask_input=kept * logits.clamp(-MASK_INPUT_CLIP, MASK_INPUT_CLIP) + (1 - kept) * asked.mask_input,
        has_mask_input=torch.maximum(again, asked.has_mask_input),
    )


def _uniform(rng: Generator, like: Tensor, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng, device=like.device)


def _normal(rng: Generator, like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, device=like.device)


def _turned(views: Tensor, meta: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """The whole batch mirrored and transposed, or not."""
    across, down, swap = (torch.rand(3, generator=rng, device=views.device) < 0.5).tolist()
    box, scale = meta[:, :8].reshape(-1, 2, 2, 2), meta[:, 8:]  # (B, box or limits, low or high, x or y)
    for axis, wanted in enumerate((across, down)):
        if wanted:
            views, box = views.flip(3 - axis), box.clone()
            box[..., axis] = VIEW - 1 - box[..., axis].flip(-1)
    if swap:
        views, box, scale = views.transpose(2, 3), box.flip(-1), scale.flip(-1)
    return views, torch.cat([box.reshape(-1, 8), scale], 1)


def _jittered(meta: Tensor, rng: Generator, most: float | None) -> Tensor:
    """(B, 4) boxes in view pixels, clipped to the picture, at least one picture pixel wide and high."""
    box, limits, scale = meta[:, :4], meta[:, 4:8], meta[:, 8:]
    sides = (box[:, 2:] - box[:, :2]).clamp_min(1 / scale).repeat(1, 2)
    amount = 0.05 if most is None else most * _uniform(rng, meta, len(meta), 1)
    moved = box + (2 * _uniform(rng, meta, len(meta), 4) - 1) * amount * sides
    if most is not None:  # half of them a little too wide, as boxes around a model's own masks are made
        grown = 0.07 * (_uniform(rng, meta, len(meta), 1) < 0.5) * sides
        moved = moved + grown * moved.new_tensor([-1, -1, 1, 1])
    moved = torch.maximum(torch.minimum(moved, limits[:, 2:].repeat(1, 2)), limits[:, :2].repeat(1, 2))
    return torch.cat([moved[:, :2], torch.maximum(moved[:, 2:], moved[:, :2] + 1 / scale)], 1)


def _cropped(views: Tensor, boxes: Tensor, meta: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (B, 4, S, S), boxes and outer limits (B, 4) in their frame: `crop.window_of` for a batch of views."""
    limits, scale = meta[:, 4:8], meta[:, 8:]
    sides = (boxes[:, 2:] - boxes[:, :2]) * scale  # in pixels of the picture
    window = torch.maximum(sides, sides.flip(1) / MAX_ASPECT) * (1 + 2 * MARGIN)
    window = window.clamp_min(MIN_WINDOW) / scale
    corner = (boxes[:, :2] + boxes[:, 2:] - window) / 2
    at = (torch.arange(side, device=views.device) + 0.5) / side
    x, y = (corner[:, i, None] + at * window[:, i, None] for i in (0, 1))
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    grid = (2 * grid + 1) / VIEW - 1
    crops = F.grid_sample(views, grid, mode="bilinear", padding_mode="border", align_corners=False)
    edges = limits + 0.5 / scale.repeat(1, 2) * limits.new_tensor([-1, -1, 1, 1])
    placed, outer = ((values - corner.repeat(1, 2)) * (side / window).repeat(1, 2) - 0.5 for values in (boxes, edges))
    return crops, placed, outer


def _degraded(truth: Tensor, rng: Generator) -> Tensor:
    """Logits as a poor model would give them: moved, swollen or shrunk, smoothed, partly missing, of another object."""
    count, side = len(truth), truth.shape[-1]
    other = _uniform(rng, truth, count) < 0.06
    mask = torch.where(other[:, None, None, None], truth.roll(1, 0), truth)
    move = 0.12 * _normal(rng, truth, count, 2) * _uniform(rng, truth, count, 1)
    zoom = (0.12 * _normal(rng, truth, count, 2)).exp()
    theta = torch.cat([torch.diag_embed(zoom), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(truth.shape), align_corners=False)
    mask = F.grid_sample(mask, grid, padding_mode="zeros", align_corners=False)
    soft = F.avg_pool2d(F.avg_pool2d(mask, 9, 1, 4), 9, 1, 4)
    mix = _uniform(rng, truth, count, 1, 1, 1)
    field = F.interpolate(_normal(rng, truth, count, 1, 6, 6), (side, side), mode="bicubic", align_corners=False)
    level = mix * soft + (1 - mix) * mask + 0.2 * _uniform(rng, truth, count, 1, 1, 1) * field
    torn = (_uniform(rng, truth, count, 1, 1, 1) < 0.25) & (field.flip(3) > 0.6)
    steep = (1.2 + 2 * _uniform(rng, truth, count, 1, 1, 1)).exp()
    cut = 0.25 + 0.5 * _uniform(rng, truth, count, 1, 1, 1)
    return (steep * (level.masked_fill(torn, 0) - cut) * 2).clamp(-MASK_INPUT_CLIP, MASK_INPUT_CLIP)


def _points(rough: Tensor, boxes: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """(B, 2, 2) points deep inside and deep outside of a rough mask within the box, and (B, 2) labels 1, 0 or -1."""
    at = torch.arange(rough.shape[-1], device=rough.device)
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    inside = ((at >= y0) & (at <= y1))[:, None, :, None] & ((at >= x0) & (at <= x1))[:, None, None, :]
    mask = (rough > 0).float()
    points, labels = [], []
    for label, region in ((1, mask), (0, 1 - mask)):
        depth = F.avg_pool2d(region, 15, 1, 7) * region * inside
        point, found = _peak(depth * (0.7 + 0.3 * _uniform(rng, depth, *depth.shape)))
        wanted = found & (_uniform(rng, depth, len(depth)) < POINT_SHARE)
        points.append(point)
        labels.append(torch.where(wanted, label, -1))
    return torch.stack(points, 1), torch.stack(labels, 1)


def _peak(plane: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2) as (x, y) of the highest pixel, and (B,) whether it is above 0."""
    height, index = plane.flatten(1).max(1)
    side = plane.shape[-1]
    return torch.stack([index % side, index // side], 1).float(), height > 0
