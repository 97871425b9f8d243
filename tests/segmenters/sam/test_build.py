"""SAM from the official modules, and checkpoints that do not fit."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.segmenter_suite import SMALL, random_sam
from safetensors.torch import save_file
from segment_anything import sam_model_registry

from kmine.errors import UserError
from kmine.segmenters.sam.build import ARCHITECTURES, build_sam
from kmine.segmenters.sam.segmenter import SamSegmenter


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "sam_small", SMALL)
    return random_sam()


def signature(sam) -> str:
    return SamSegmenter(sam, name="s").signature


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_and_settings_are_those_of_the_official_models(name) -> None:
    with torch.device("meta"):
        ours, official = build_sam(name, None), sam_model_registry[name.removeprefix("sam_")]()
    assert str(ours) == str(official)  # every layer with its settings
    shapes = [{key: value.shape for key, value in sam.state_dict().items()} for sam in (ours, official)]
    assert shapes[0] == shapes[1]
    for attribute in ("window_size", "attn.num_heads", "attn.scale", "attn.use_rel_pos"):
        values = [[_get(block, attribute) for block in sam.image_encoder.blocks] for sam in (ours, official)]
        assert values[0] == values[1]
    for path in ("mask_decoder.num_multimask_outputs", "mask_decoder.transformer.num_heads", "training"):
        assert _get(ours, path) == _get(official, path)


def _get(owner, path: str):
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def test_a_checkpoint_gives_back_every_weight(small, tmp_path) -> None:
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    assert signature(build_sam("sam_small", tmp_path / "w.safetensors", 256)) == signature(small)


@pytest.mark.parametrize("prefix", ["model.", "sam.", "_orig_mod.", "model.module.sam_model."])
def test_prefixes_of_trainers_are_removed(small, tmp_path, prefix) -> None:
    state = {f"{prefix}{name}": value for name, value in small.state_dict().items()}
    torch.save({"state_dict": state | {"loss.weight": torch.ones(2)}, "epoch": 1}, tmp_path / "w.ckpt")
    assert signature(build_sam("sam_small", tmp_path / "w.ckpt", 256)) == signature(small)


def to_hugging_face(name: str) -> str:
    """The name that transformers' convert_sam_to_hf.py gives a tensor."""
    for official, theirs in (
        *(("iou_prediction_head.layers.0", "iou_prediction_head.proj_in"), ("blocks", "layers")),
        *(("iou_prediction_head.layers.1", "iou_prediction_head.layers.0"), ("pe_layer.", "shared_embedding.")),
        *(("iou_prediction_head.layers.2", "iou_prediction_head.proj_out"), ("image_encoder", "vision_encoder")),
        *(("output_upscaling.0", "upscale_conv1"), ("output_upscaling.1", "upscale_layer_norm")),
        *(("output_upscaling.3", "upscale_conv2"), ("mask_downscaling.0", "mask_embed.conv1")),
        *(("mask_downscaling.1", "mask_embed.layer_norm1"), ("mask_downscaling.3", "mask_embed.conv2")),
        *(("mask_downscaling.4", "mask_embed.layer_norm2"), ("mask_downscaling.6", "mask_embed.conv3")),
        *(("point_embeddings", "point_embed"), ("positional_encoding_gaussian_matrix", "positional_embedding")),
        *(("neck.0", "neck.conv1"), ("neck.1", "neck.layer_norm1"), ("neck.2", "neck.conv2")),
        *(("neck.3", "neck.layer_norm2"), ("patch_embed.proj", "patch_embed.projection"), (".norm", ".layer_norm")),
    ):
        name = name.replace(official, theirs)
    mlp = r"(output_hypernetworks_mlps\.\d+\.)layers\.(\d)"
    return re.sub(mlp, lambda m: m[1] + ("proj_in", "layers.0", "proj_out")[int(m[2])], name)


@pytest.mark.parametrize("prefix", ["", "sam."])
def test_the_layout_of_hugging_face_is_read(small, tmp_path, prefix) -> None:
    state = {to_hugging_face(name): value for name, value in small.state_dict().items()}
    assert "mask_decoder.output_hypernetworks_mlps.3.proj_out.bias" in state
    assert "mask_decoder.transformer.layer_norm_final_attn.weight" in state
    state["shared_image_embedding.positional_embedding"] = state.pop(
        "prompt_encoder.shared_embedding.positional_embedding"
    )
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    assert signature(build_sam("sam_small", tmp_path / "model.safetensors", 256)) == signature(small)


@pytest.mark.slow
def test_a_checkpoint_of_vit_b_gives_back_every_weight(tmp_path) -> None:
    sam = random_sam("sam_vit_b", image_size=1024)
    save_file(sam.state_dict(), tmp_path / "medsam.safetensors")
    assert signature(build_sam("sam_vit_b", tmp_path / "medsam.safetensors")) == signature(sam)


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (1024, "looks like sam_vit_l: use --segmenter.name sam_vit_l"),
        (1280, "looks like sam_vit_h: use --segmenter.name sam_vit_h"),
        (192, "known: "),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_with_its_name(small, tmp_path, width, words) -> None:
    save_file({"image_encoder.patch_embed.proj.weight": torch.zeros(width, 3, 16, 16)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=words):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


def test_a_checkpoint_for_another_image_size_is_refused(small, tmp_path) -> None:
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="expected sam_small for images of 512 px, got one for 256 px"):
        build_sam("sam_small", tmp_path / "w.safetensors", 512)


def test_a_checkpoint_without_the_mask_decoder_is_refused(small, tmp_path) -> None:
    state = {key: value for key, value in small.state_dict().items() if not key.startswith("mask_decoder")}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"Missing key.*mask_decoder"):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


def test_a_checkpoint_of_another_model_is_refused(small, tmp_path) -> None:
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"encoder.weight.*not a SAM image encoder"):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 200_000])
def test_a_damaged_file_is_an_error_in_one_line(small, tmp_path, suffix, keep) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(small.state_dict(), path)
    else:
        save_file(small.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"damaged.*again|an empty file.*again") as caught:
        build_sam("sam_small", path, 256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "kernel", "actual"),
    [("sam_vit_b", 3, "mobile_sam"), ("mobile_sam", 1, "lite_medsam"), ("lite_medsam", 3, "mobile_sam")],
)
def test_a_tiny_vit_under_another_name_is_refused_with_its_own(tmp_path, asked, kernel, actual) -> None:
    save_file({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, kernel, kernel)}, tmp_path / "w")
    with pytest.raises(UserError, match=rf"the weights of {asked}, got {actual}'s; use --segmenter.name {actual}"):
        build_sam(asked, tmp_path / "w")


def test_a_vit_is_no_tiny_vit(small, tmp_path) -> None:
    save_file(small.state_dict(), tmp_path / "w")
    with pytest.raises(UserError, match=r"the weights of mobile_sam, got sam_vit_b's; use --segmenter.name sam_vit_b"):
        build_sam("mobile_sam", tmp_path / "w")


@pytest.mark.parametrize("side", [64, 128])
def test_tiny_vits_are_read_back(tmp_path, side) -> None:
    name = "lite_medsam" if side == 64 else "mobile_sam"
    sam = build_sam(name, None, side)
    torch.save({"model": sam.state_dict()}, tmp_path / "w.pth")
    assert signature(build_sam(name, tmp_path / "w.pth", side)) == signature(sam)
