"""The network of `tiny`: a small U-net on crops of S x S around B boxes, with the prompts as extra planes.

Mask logits are those of the ellipse inscribed in the box plus its output, which is zero in an untrained network.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmine.segmenters.base import MASK_INPUT_CLIP

SIDE = 96
"""S: the short side of a box covers at least 26 pixels, the long one 53."""
WIDTHS = (24, 48, 96, 160)
"""Channels at S/2, S/4, S/8 and S/16."""
NUM_PLANES = 10
"""RGB, inside the image, box, ellipse, foreground points, background points, mask input, has a mask input."""
ELLIPSE_SLOPE = 4.0
"""Logit at the ellipse's centre, and decrease per radius outwards."""
ELLIPSE_FLOOR = -8.0
POINT_SIGMA = 2.5
"""Crop pixels."""
MIN_CONTRAST = 4.0
"""Least standard deviation of a crop in grey levels of 255, so that noise in a flat crop is not amplified."""


class NetworkInput(NamedTuple):
    """Crops and prompts, as tensors in the crop's frame."""

    image: Tensor
    """(B, 3, S, S) in [0, 255]."""
    limits: Tensor
    """(B, 4) XYXY, outer edges of the image."""
    boxes: Tensor
    """(B, 4) XYXY, with area."""
    points: Tensor
    """(B, P, 2) as (x, y); P may be 0."""
    point_labels: Tensor
    """(B, P): 1 foreground, 0 background, -1 no point."""
    mask_input: Tensor
    """(B, 1, S, S) logits; zeros where absent."""
    has_mask_input: Tensor
    """(B,) 0 or 1."""


def ellipse_logits(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, 4) boxes to (B, 1, height, width) logits: 0 on the inscribed ellipse, positive inside, in [floor, slope]."""
    x0, y0, x1, y1 = boxes.unbind(1)
    rows, columns = (
        (torch.arange(count, device=boxes.device) - (low + high)[:, None] / 2) / ((high - low)[:, None] / 2)
        for low, high, count in ((y0, y1, height), (x0, x1, width))
    )
    radius = (rows[:, :, None] ** 2 + columns[:, None, :] ** 2).sqrt()
    return (ELLIPSE_SLOPE * (1 - radius)).clamp_min(ELLIPSE_FLOOR)[:, None]


def planes_of(inputs: NetworkInput) -> Tensor:
    """(B, NUM_PLANES, S, S): crops normalised by their own mean and contrast, and prompts."""
    side = inputs.image.shape[-1]
    inside = _indicator(inputs.limits, side, soft=False)
    count = inside.sum((2, 3), keepdim=True).clamp_min(1)
    centred = (inputs.image - (inputs.image * inside).sum((2, 3), keepdim=True) / count) * inside
    deviation = ((centred**2).sum((1, 2, 3), keepdim=True) / (3 * count)).sqrt()
    planes = [
        centred / deviation.clamp_min(MIN_CONTRAST),
        inside,
        _indicator(inputs.boxes, side, soft=True),
        ellipse_logits(inputs.boxes, side, side) / ELLIPSE_SLOPE,
        _gaussians(inputs.points, inputs.point_labels == 1, side),
        _gaussians(inputs.points, inputs.point_labels == 0, side),
        inputs.mask_input.clamp(-MASK_INPUT_CLIP, MASK_INPUT_CLIP) / MASK_INPUT_CLIP,
        inputs.has_mask_input[:, None, None, None].expand(-1, 1, side, side),
    ]
    return torch.cat(planes, 1)


def _indicator(boxes: Tensor, side: int, soft: bool) -> Tensor:
    """(B, 1, S, S): 1 inside the rectangle, 0 outside; a soft one is 1/2 at the edge."""
    at = torch.arange(side, device=boxes.device, dtype=boxes.dtype)
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    columns, rows = torch.minimum(at - x0, x1 - at), torch.minimum(at - y0, y1 - at)
    depth = torch.minimum(rows[:, None, :, None], columns[:, None, None, :])
    return depth.sigmoid() if soft else (depth >= 0).to(boxes.dtype)


def _gaussians(points: Tensor, chosen: Tensor, side: int) -> Tensor:
    """(B, 1, S, S): Gaussians of height 1 at the chosen points, the maximum where they overlap."""
    if points.shape[1] == 0:
        return points.new_zeros(len(points), 1, side, side)
    at = torch.arange(side, device=points.device, dtype=points.dtype)
    columns, rows = (torch.exp(-(((at - points[..., i, None]) / POINT_SIGMA) ** 2) / 2) for i in (0, 1))
    bumps = rows[..., :, None] * columns[..., None, :] * chosen[..., None, None]
    return bumps.amax(1, keepdim=True)


def _norm(width: int) -> nn.Module:
    """Statistics of one crop, not of a batch: the output for a crop does not depend on its batch."""
    return nn.GroupNorm(8, width)


class _Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = _norm(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.first(x)))
        return F.relu(x + self.norm2(self.second(inner)))


class _Down(nn.Sequential):
    """Halves the sides."""

    def __init__(self, before: int, after: int, kernel: int = 3) -> None:
        conv = nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False)
        super().__init__(conv, _norm(after), nn.ReLU())


class _Up(nn.Module):
    """Doubles the sides and joins the encoder's features of that size."""

    def __init__(self, below: int, width: int) -> None:
        super().__init__()
        self.join = nn.Conv2d(below + width, width, 1, bias=False)
        self.norm = _norm(width)
        self.block = _Block(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        grown = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.block(F.relu(self.norm(self.join(torch.cat([grown, skip], 1)))))


class TinyNet(nn.Module):
    """(B, NUM_PLANES, S, S) planes to logits to add to the ellipse, (B, 1, S, S), and predicted IoU, (B,)."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, side: int = SIDE) -> None:
        """Random weights; `side` must be a multiple of 2 to the number of widths."""
        super().__init__()
        if side % 2 ** len(widths):
            raise ValueError(f"side: expected a multiple of {2 ** len(widths)}, got {side}")
        self.widths, self.side = widths, side
        self.stem = _Down(NUM_PLANES, widths[0], kernel=5)
        self.blocks = nn.ModuleList(_Block(width) for width in widths)
        self.downs = nn.ModuleList(_Down(a, b) for a, b in pairwise(widths))
        self.context = nn.Linear(widths[-1], widths[-1])
        self.ups = nn.ModuleList(_Up(b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.score = nn.Sequential(nn.Linear(widths[-1] + widths[0] + 4, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits to add to the ellipse's, and predicted IoU in [0, 1]."""
        x = self.blocks[0](self.stem(planes))
        skips = [x]
        for down, block in zip(self.downs, self.blocks[1:], strict=True):
            x = block(down(x))
            skips.append(x)
        # Global context at every position: borders of large smooth organs need it.
        x = deepest = x + self.context(x.mean((2, 3)))[:, :, None, None]
        for up, skip in zip(reversed(self.ups), reversed(skips[:-1]), strict=True):
            x = up(x, skip)
        added = F.pixel_shuffle(self.head(x), 2)
        return added, self._predicted_iou(planes, added, deepest, x)

    def _predicted_iou(self, planes: Tensor, added: Tensor, deepest: Tensor, finest: Tensor) -> Tensor:
        """From features in and around the mask and from the mask's certainty; no gradient reaches the mask."""
        ellipse = planes[:, 5:6] * ELLIPSE_SLOPE
        prob, base = (ellipse + added).detach().sigmoid(), ellipse.sigmoid()
        share = F.avg_pool2d(prob, 2)
        inside = (finest * share).sum((2, 3)) / share.sum((2, 3)).clamp_min(1)
        area = prob.sum((1, 2, 3)).clamp_min(1)
        mask = (prob >= 0.5).to(prob.dtype)
        both = (prob * mask).sum((1, 2, 3))
        certainty = [
            # Expected IoU if the probabilities were calibrated; it depends on the mask only, so it still holds on
            # images unlike those of training.
            both / (mask.sum((1, 2, 3)) + area - both).clamp_min(1),
            (prob * (1 - prob)).sum((1, 2, 3)) / area,
            (prob - base).abs().sum((1, 2, 3)) / area,
            area / base.sum((1, 2, 3)).clamp_min(1) - 1,
        ]
        features = torch.cat([deepest.mean((2, 3)), inside, torch.stack(certainty, 1).clamp(-2, 2)], 1)
        return self.score(features)[:, 0].sigmoid()
