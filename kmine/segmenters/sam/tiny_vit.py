"""TinyViT with SAM's neck: the image encoder of MobileSAM and LiteMedSAM.

TinyViT: Wu et al. 2022. MobileSAM (Zhang et al. 2023, mobile_sam/modeling/tiny_vit_sam.py) keeps the stride of the last
merging at 1. Tensors have the names of the published checkpoints. Letters: B images, C channels, H, W rows and columns.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
MERGE_STRIDES = (2, 2, 1)
"""Of the three mergings between the stages; TinyViT's own are all 2."""
OUT_CHANNELS = 256


class TinyVitEncoder(nn.Module):
    """(B, 3, E, E) to (B, 256, E/16, E/16), of LiteMedSAM (B, 256, E/4, E/4).

    Args:
        img_size: E, a multiple of 16.
        lite: LiteMedSAM's, without the first two strides and without the unused classifier of MobileSAM's checkpoint
            (tiny_vit_sam.py of bowang-lab/MedSAM, branch LiteMedSAM).
    """

    def __init__(self, img_size: int, *, lite: bool) -> None:
        super().__init__()
        self.img_size = img_size
        first, kernel = WIDTHS[0], (1, 1) if lite else (3, 2)
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            _conv(3, first // 2, *kernel), nn.GELU(), _conv(first // 2, first, *kernel)
        )
        self.layers = nn.ModuleList([_stage(n) for n in range(len(WIDTHS))])
        if not lite:
            self.norm_head = nn.LayerNorm(WIDTHS[-1])
            self.head = nn.Linear(WIDTHS[-1], 1000)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], OUT_CHANNELS, 1, bias=False),
            LayerNorm2d(OUT_CHANNELS),
            nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(OUT_CHANNELS),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised images."""
        x = self.patch_embed.seq(images)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            x = stage.downsample(x) if hasattr(stage, "downsample") else x
        return self.neck(x)


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias (`c`) and its batch norm (`bn`)."""
    pair = nn.Sequential()
    pair.add_module("c", nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False))
    pair.add_module("bn", nn.BatchNorm2d(fan_out))
    return pair


def _stage(n: int) -> nn.Module:
    stage, width = nn.Module(), WIDTHS[n]
    stage.blocks = nn.ModuleList(
        [_MBConv(width) if n == 0 else _Block(width, HEADS[n], WINDOWS[n]) for _ in range(DEPTHS[n])]
    )
    if n + 1 < len(WIDTHS):
        stage.downsample = _Merging(width, WIDTHS[n + 1], MERGE_STRIDES[n])
    return stage


class _MBConv(nn.Module):
    """An inverted bottleneck of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(width, 4 * width, 1)
        self.conv2 = _conv(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = _conv(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class _Merging(nn.Module):
    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(width, wider, 1)
        self.conv2 = _conv(wider, wider, 3, stride, groups=wider)
        self.conv3 = _conv(wider, wider, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class _Attention(nn.Module):
    """Attention within windows of `side` x `side` tokens, with a bias a head for each pair of distances."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        tokens = list(product(range(side), range(side)))
        pairs = [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in product(tokens, tokens)]
        numbers = {distances: n for n, distances in enumerate(dict.fromkeys(pairs))}
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(numbers)))
        index = torch.tensor([numbers[pair] for pair in pairs]).view(len(tokens), len(tokens))
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, tokens, C) to the same."""
        windows, tokens, width = x.shape
        # Heads are outermost in the checkpoint: each has its own query, key and value.
        qkv = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(windows, tokens, width))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class _Block(nn.Module):
    """Attention in windows, a depthwise convolution, and an MLP."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.attn = _Attention(width, heads, side)
        self.mlp = _Mlp(width)
        self.local_conv = _conv(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_conv(x + self._attended(x))
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _attended(self, x: Tensor) -> Tensor:
        """Attention over (B, C, H, W), padded with zeros to whole windows."""
        side, (batch, width, height, length) = self.side, x.shape
        x = F.pad(x, (0, -length % side, 0, -height % side))
        rows, columns = x.shape[2] // side, x.shape[3] // side
        x = x.view(batch, width, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        x = self.attn(x.reshape(batch * rows * columns, side * side, width))
        x = x.view(batch, rows, columns, side, side, width).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, width, rows * side, columns * side)[:, :, :height, :length]
