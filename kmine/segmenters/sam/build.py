"""Build Segment Anything, and networks of its layout, from the official modules, and load a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from kmine.errors import UserError
from kmine.io.tensor_file import without_prefix
from kmine.segmenters.base import ALL_ABILITIES, Abilities
from kmine.segmenters.frame import SquareFrame
from kmine.segmenters.pixels import BOXES_ONLY, LITE_ABILITIES, lite_medsam_pixels, medsam_pixels
from kmine.segmenters.sam.tiny_vit import TinyVitEncoder
from kmine.segmenters.weights import one_line, read_checkpoint


@dataclass(frozen=True)
class Architecture:
    """Dimensions of one of the SAM image encoders."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    """Blocks with global attention; all others attend in windows of 14 x 14 tokens."""


ARCHITECTURES: dict[str, Architecture] = {
    "sam_vit_b": Architecture(768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l": Architecture(1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h": Architecture(1280, 32, 16, (7, 15, 23, 31)),
}

TINY_VITS = {"mobile_sam": 1024, "lite_medsam": 256}
"""Networks with a TinyViT as image encoder, and E; features of both are (256, 64, 64)."""
PATCH_EMBED = "image_encoder.patch_embed.seq.0.c.weight"
"""A tensor that every TinyViT has; (32, 3, 3, 3) in MobileSAM, (32, 3, 1, 1) in LiteMedSAM."""


@dataclass(frozen=True)
class Feed:
    """How a network is given images and prompts."""

    frame: SquareFrame
    version: str = ""
    """Part of signatures; empty for SAM's own way."""
    abilities: Abilities = ALL_ABILITIES
    pixels: Callable[[NDArray[np.uint8], SquareFrame], NDArray[np.float32]] | None = None
    """(H, W, 3) uint8 and the frame to (3, E, E); None: SAM's own."""


def feed_of(name: str, image_size: int = 1024) -> Feed:
    """The feed of a network by its name in the settings; SAM's for all but MedSAM and LiteMedSAM."""
    if name == "medsam":
        frame = SquareFrame(image_size, squash=True, as_probabilities=True)
        return Feed(frame, " medsam 1", BOXES_ONLY, medsam_pixels)
    if name == "lite_medsam":
        return Feed(SquareFrame(image_size), " lite medsam 1", LITE_ABILITIES, lite_medsam_pixels)
    return Feed(SquareFrame(image_size))


ANCHORS = ("image_encoder.patch_embed.proj.weight", "vision_encoder.patch_embed.projection.weight", PATCH_EMBED)
"""A tensor that every SAM has, by its official name and by that of Hugging Face, and one of every TinyViT."""
HUGGING_FACE = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    *((rf"neck\.{name}", f"neck.{n}") for n, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))),
    *((rf"mask_embed\.conv{n}", f"mask_downscaling.{3 * n - 3}") for n in (1, 2, 3)),
    *((rf"mask_embed\.layer_norm{n}", f"mask_downscaling.{3 * n - 2}") for n in (1, 2)),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.upscale_conv1", ".output_upscaling.0"),
    (r"\.upscale_layer_norm", ".output_upscaling.1"),
    (r"\.upscale_conv2", ".output_upscaling.3"),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.0", r"\1.layers.1"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
    (r"\.layer_norm", ".norm"),
    (
        r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
)
"""Patterns of Hugging Face's tensor names and the official names, after transformers' convert_sam_to_hf.py."""
PATCH = 16
PROMPT_DIM = 256


def build_sam(name: str, checkpoint: Path | None, image_size: int | None = None) -> Sam:
    """The official modules of an architecture, in eval mode on the CPU.

    Args:
        name: a key of `ARCHITECTURES` or `TINY_VITS`, or medsam.
        checkpoint: weights to load; None: random ones from torch's global generator.
        image_size: E, a multiple of 16; default: 1024, of lite_medsam 256, which alone published weights fit.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another architecture or image size.
    """
    image_size = image_size or TINY_VITS.get(name, 1024)
    # Read before the modules are built: a wrong file fails at once, without drawing a large encoder.
    state = None if checkpoint is None else _read(name, checkpoint, image_size)
    if image_size % PATCH:
        raise ValueError(f"image_size: expected a multiple of {PATCH}, got {image_size}")
    encoder = _tiny_vit(name, image_size) if name in TINY_VITS else _vit(_architecture(name), image_size)
    side = image_size // 4 if name == "lite_medsam" else image_size // PATCH
    prompt_encoder = PromptEncoder(PROMPT_DIM, (side, side), (image_size, image_size), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, num_heads=8, mlp_dim=2048)
    sam = Sam(encoder, prompt_encoder, MaskDecoder(transformer_dim=PROMPT_DIM, transformer=transformer)).eval()
    if state is not None:
        try:
            sam.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{checkpoint}: expected the weights of {name}, got other tensors: {one_line(error)}; "
                "use a checkpoint of the whole SAM"
            ) from error
    return sam


def _architecture(name: str) -> Architecture:
    return ARCHITECTURES["sam_vit_b" if name == "medsam" else name]


def _tiny_vit(name: str, image_size: int) -> TinyVitEncoder:
    return TinyVitEncoder(image_size, lite=name == "lite_medsam")


def _vit(arch: Architecture, image_size: int) -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        out_chans=PROMPT_DIM,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=arch.global_attn_indexes,
    )


def _read(name: str, path: Path, image_size: int) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint whose image encoder has the expected width and image size, by official names."""
    state = _official_names(without_prefix(read_checkpoint(path), ANCHORS))
    tiny, patches = state.get(PATCH_EMBED), state.get(ANCHORS[0])
    if tiny is not None or (patches is not None and name in TINY_VITS):
        kernel = tiny.shape[-1] if tiny is not None and tiny.ndim == 4 else 0
        actual = {3: "mobile_sam", 1: "lite_medsam"}.get(kernel, "sam_vit_b")
        if actual != name:
            raise UserError(f"{path}: expected the weights of {name}, got {actual}'s; use --segmenter.name {actual}")
        return state
    if patches is None:
        raise UserError(
            f"{path}: expected the weights of {name}, got {sorted(state)[:3]}..., not a SAM image encoder; "
            "use a checkpoint of the whole SAM"
        )
    width, expected = patches.shape[0] if patches.ndim else 0, _architecture(name).embed_dim
    if width != expected:
        same_width = [other for other, arch in ARCHITECTURES.items() if arch.embed_dim == width]
        cure = f"known: {sorted(ARCHITECTURES)}"
        if same_width:
            cure = f"it looks like {same_width[0]}: use --segmenter.name {same_width[0]}"
        raise UserError(f"{path}: expected {name} with {expected} channels, got {width}; {cure}")
    positions = state.get("image_encoder.pos_embed")
    if positions is not None and positions.ndim > 1 and positions.shape[1] * PATCH != image_size:
        raise UserError(
            f"{path}: expected {name} for images of {image_size} px, got one for {positions.shape[1] * PATCH} px; "
            "use a checkpoint trained at that size"
        )
    return state


def _official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a SAM by official names; those of a loss or of another model beside it are left out."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, official in HUGGING_FACE if ANCHORS[1] in state else ():
            name = re.sub(pattern, official, name)
        renamed[name] = tensor
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    return {name: tensor for name, tensor in renamed.items() if name.startswith(parts)} or state
