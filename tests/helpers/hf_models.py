"""Models of transformers with tiny settings and seeded random weights, saved as on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SIDE = 128
"""Of the square input."""


def _prompting(kind: str, hidden: int = 32) -> dict:
    decoder = {"hidden_size": hidden, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    if kind == "sam_hq":
        decoder["vit_dim"] = 48
    prompts = {"hidden_size": hidden, "image_size": SIDE, "patch_size": 16}
    return {"prompt_encoder_config": prompts, "mask_decoder_config": decoder}


def _sam_vision() -> dict:
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 96}
    size = {"image_size": SIDE, "output_channels": 32, "num_pos_feats": 16, "window_size": 3}
    return {**shape, **size, "global_attn_indexes": [1, 2], "initializer_range": 0.02}


def _hiera() -> dict:
    stages = {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128]}
    heads = {"num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 8, 4]}
    backbone = {"hidden_size": 16, "num_attention_heads": 1, "image_size": [SIDE, SIDE], **stages, **heads}
    backbone |= {"global_attention_blocks": [3], "model_type": "sam2_hiera_det_model"}
    sizes = [[SIDE // ratio] * 2 for ratio in (4, 8, 16)]
    return {
        "backbone_config": backbone,
        "backbone_channel_list": [128, 64, 32, 16],
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": sizes,
    }


def _sam3_vision() -> dict:
    backbone = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone |= {"image_size": SIDE, "pretrain_image_size": SIDE, "patch_size": 16, "window_size": 4}
    backbone |= {"global_attn_indexes": [1], "model_type": "sam3_vit_model"}
    sizes = [[SIDE // ratio] * 2 for ratio in (4, 8, 16)]
    return {"backbone_config": backbone, "fpn_hidden_size": 32, "backbone_feature_sizes": sizes}


def _edgetam_vision() -> dict:
    timm = {"model_type": "timm_wrapper", "architecture": "repvit_m1", "do_pooling": False, "num_classes": 2}
    timm |= {"model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}}
    sizes = [[SIDE // ratio] * 2 for ratio in (4, 8, 16)]
    return {
        "backbone_config": timm,
        "backbone_channel_list": [384, 192, 96, 48],
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": sizes,
    }


def _hiera_of_video() -> dict:
    return {**_hiera(), "fpn_hidden_size": 128}  # more channels than the memory's 64, as in every checkpoint


KINDS = {
    "sam": ("SamConfig", "SamModel", "SamImageProcessor", _sam_vision),
    "sam_hq": ("SamHQConfig", "SamHQModel", "SamImageProcessor", _sam_vision),
    "sam2": ("Sam2Config", "Sam2Model", "Sam2ImageProcessor", _hiera),
    "sam3_tracker": ("Sam3TrackerConfig", "Sam3TrackerModel", "Sam3ImageProcessor", _sam3_vision),
    "edgetam": ("EdgeTamConfig", "EdgeTamModel", "Sam2ImageProcessor", _edgetam_vision),
}
VIDEO = {"sam2_video": ("Sam2VideoConfig", "Sam2VideoModel", "Sam2ImageProcessor", _hiera_of_video)}
MEMORY = {
    "sam2_video": {
        **{"image_size": SIDE, "memory_attention_hidden_size": 128, "memory_attention_num_layers": 1},
        **{"memory_attention_feed_forward_hidden_size": 32, "memory_attention_rope_feat_sizes": [SIDE // 16] * 2},
        **{"memory_encoder_hidden_size": 128, "memory_encoder_output_channels": 64, "mask_downsampler_embed_dim": 128},
        **{"memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 32, "memory_fuser_num_layers": 1},
    }
}
PROCESSORS = {
    "sam": "SamProcessor",
    "sam_hq": "SamHQProcessor",
    "sam2": "Sam2Processor",
    "edgetam": "Sam2Processor",
    "sam3_tracker": "Sam3TrackerProcessor",
}


def save_random(kind: str, folder: Path, seed: int = 0) -> Path:
    """A folder with config.json, preprocessor_config.json and model.safetensors of a family."""
    transformers = pytest.importorskip("transformers")
    config, network, processor, vision = (KINDS | VIDEO)[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompting = _prompting(kind, 128 if kind in MEMORY else 32)
        settings = getattr(transformers, config)(vision_config=vision(), **prompting, **MEMORY.get(kind, {}))
        model = getattr(transformers, network)(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    if kind in ("sam", "sam_hq"):
        size = {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
    else:
        size = {"size": {"height": SIDE, "width": SIDE}}
    getattr(transformers, processor)(**size).save_pretrained(folder)
    return folder
