"""SAM's official image encoder with two operations replaced: several times faster, equal up to rounding.

Legend: B images or windows, H, W their tokens (64 x 64, or 14 x 14 in a window), L = H W, N = B x heads, C channels of
one head.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn

VERSION = 1
"""Part of the cache key. Increase it when embeddings change by more than rounding."""
CPU_MASK_FLOATS = 1 << 22
"""Most floats of the attention's mask at once, unless one head needs more: about the size of a CPU's cache."""
GPU_MASK_FLOATS = 1 << 27
"""The same on a GPU: 0.5 GB."""
QUERIES_A_THREAD = 256
"""Queries of one head in a work item of the fused attention on a CPU."""


def use_fused_attention(encoder: ImageEncoderViT) -> None:
    """Replace attention and linear layers of an encoder in place; for inference only, idempotent.

    The result differs from the official one by float32 rounding. Weights, structure and state dict do not change.
    """
    for block in encoder.blocks:
        block.attn.forward = MethodType(attention, block.attn)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2):
            layer.forward = MethodType(linear, layer)


def attention(module: Attention, x: Tensor) -> Tensor:
    """`Attention.forward` of the official encoder on (B, H, W, channels), without gradients.

    That materialises all scores, scale * q k^T + q Rh + q Rw. Here the two products with the relative positions are the
    mask of PyTorch's fused attention, a few heads at a time. (Appended to the query, with one-hot codes of row and
    column in the key, they are as exact without a mask, but took 2.5 times as long on a CPU at 1024 px.)
    """
    batch, height, width, _ = x.shape
    tokens, heads = height * width, module.num_heads
    qkv = module.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, batch * heads, tokens, -1).unbind(0)
    if not module.use_rel_pos:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=module.scale)[0]
    else:
        grid = q.reshape(-1, height, width, q.shape[-1])
        of_rows = torch.einsum("nhwc,hkc->nhwk", grid, get_rel_pos(height, height, module.rel_pos_h))
        of_columns = torch.einsum("nhwc,wkc->nhwk", grid, get_rel_pos(width, width, module.rel_pos_w))
        out = _attend(q, k, v, of_rows.flatten(1, 2), of_columns.flatten(1, 2), module.scale)
    out = out.reshape(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return module.proj(out.reshape(batch, height, width, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, of_rows: Tensor, of_columns: Tensor, scale: float) -> Tensor:
    """(N, L, C) from queries, keys and values (N, L, C) and the scores of key rows (N, L, H) and columns (N, L, W)."""
    count, tokens, _ = q.shape
    step = min(count, _at_once(tokens, q.device.type))
    # One buffer for all: allocating one of this size takes as long as the attention.
    mask = q.new_empty(step, tokens, of_rows.shape[-1], of_columns.shape[-1])
    out = torch.empty_like(v)
    for first in range(0, count, step):
        batch = slice(first, first + step)
        rows, columns = of_rows[batch, :, :, None], of_columns[batch, :, None, :]
        added = torch.add(rows, columns, out=mask[: len(rows)]).flatten(2)
        qkv = (tensor[None, batch] for tensor in (q, k, v))
        out[batch] = F.scaled_dot_product_attention(*qkv, attn_mask=added[None], scale=scale)[0]
    return out


def _at_once(tokens: int, device: str) -> int:
    """Heads that share one mask: few, to keep it small, but enough for all threads of a CPU."""
    if device != "cpu":
        return max(1, GPU_MASK_FLOATS // tokens**2)
    shares = -(-tokens // QUERIES_A_THREAD)
    return max(1, CPU_MASK_FLOATS // tokens**2, -(-torch.get_num_threads() // shares))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`Linear.forward` on (B, H, W, channels); on a CPU as a 1 x 1 convolution, which PyTorch runs in oneDNN.

    That is twice as fast as MKL's matrix product on an AMD processor.
    """
    if x.device.type != "cpu":
        return F.linear(x, layer.weight, layer.bias)
    # Rows of tokens become images one pixel high: PyTorch uses oneDNN only for convolutions of many images.
    rows = x.reshape(-1, 1, *x.shape[-2:]).permute(0, 3, 1, 2)
    out = F.conv2d(rows, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
    return out.reshape(*x.shape[:-1], -1)
