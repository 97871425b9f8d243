"""SAM from the official modules, and checkpoints that do not fit."""

from __future__ import annotations

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
    with pytest.raises(UserError, match=r"damaged or not a checkpoint.*again") as caught:
        build_sam("sam_small", path, 256)
    assert "\n" not in str(caught.value)
