"""Encoder weights from files: several spellings of one encoder; errors that give the reason."""

from __future__ import annotations

import os
import socket
import time

import pytest
import timm
import torch
from helpers.models import scramble, small, small_sks
from helpers.small import same
from safetensors.torch import save_file
from torch import nn

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.models.encoder_weights import load_encoder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "e.safetensors"


def save(path, module: nn.Module, **extra: torch.Tensor) -> None:
    save_file({k: v.contiguous() for k, v in module.state_dict().items()} | extra, path)


def build(cfg: ModelConfig, seed: int = 0) -> LocalModel:
    return build_model(cfg, 2, seed)


def test_a_weights_file_is_loaded_into_the_encoder_only(path):
    donor = build(small(), seed=5).net
    save(path, donor.encoder, **{"classifier.weight": torch.zeros(3)})
    net = build(small(encoder_weights=str(path))).net
    assert same(net.encoder.state_dict(), donor.encoder.state_dict())
    assert not same(net.segmentation_head.state_dict(), donor.segmentation_head.state_dict())


def test_weights_of_another_architecture_are_refused_with_a_count(path):
    save(path, build(small()).net.encoder)
    with pytest.raises(UserError, match=r"not a checkpoint of encoder resnet18: \d+ of \d+ tensors missing"):
        build(ModelConfig(encoder="resnet18", encoder_weights=str(path)))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_damaged_or_missing_weights_are_one_clear_error(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"e\.safetensors: expected model\.encoder_weights"):
        build(small(encoder_weights=str(path)))
    with pytest.raises(UserError, match="no file"):
        build(small(encoder_weights=str(path.with_name("none.safetensors"))))


def test_both_encoders_of_sks_are_loaded_and_nothing_else(path):
    donor = timm.create_model("mobilenetv3_small_050")
    scramble(donor)
    save(path, donor)
    loaded, plain = build(small_sks(encoder_weights=str(path))), build(small_sks())
    for pyramid in (loaded.net.fine, loaded.net.coarse.pyramid):
        assert torch.equal(pyramid.stages[0].parts[0].weight, donor.conv_stem.weight)
        assert torch.equal(pyramid.stages[2].parts[0][0].conv_dw.weight, donor.blocks[1][0].conv_dw.weight)
    assert torch.equal(loaded.net.decoder.head.weight, plain.net.decoder.head.weight)


@pytest.mark.parametrize("prefix", ["encoder.", "model.", "module.backbone."])
def test_a_prefix_that_all_tensors_have_is_removed_and_torch_files_are_read(path, prefix):
    donor = build(small(), seed=5).net
    state = {f"{prefix}{name}": value for name, value in donor.encoder.state_dict().items()}
    torch.save({"model_state_dict": state | {"head.weight": torch.ones(1)}}, path)
    assert same(build(small(encoder_weights=str(path))).net.encoder.state_dict(), donor.encoder.state_dict())


def test_weights_of_torchvision_s_mobilenet_v2_fit_timm_s(path):
    donor = build(ModelConfig(encoder_depth=5, decoder_channels=8), seed=3).eval().net.encoder
    save(path, donor)
    model = build(small_sks(encoder="mobilenetv2_100", levels=4, encoder_weights=str(path))).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = {f.shape[-1]: f for f in donor(x)}
    for feature in model.net.fine(x)[:-1]:  # torchvision's deepest features include those of its classifier
        assert torch.allclose(feature, expected[feature.shape[-1]], atol=1e-5)


def test_timm_s_checkpoint_of_a_whole_model_fits_its_features_only_encoder(path):
    swin = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
    whole = timm.create_model("swinv2_tiny_window8_256", **swin)
    assert "layers.1.downsample.reduction.weight" in whole.state_dict()
    save(path, whole)
    encoder = timm.create_model("swinv2_tiny_window8_256", **swin, features_only=True)
    load_encoder(encoder, str(path), "swin")
    assert torch.equal(encoder["layers_1"].downsample.reduction.weight, whole.layers[1].downsample.reduction.weight)


def test_a_hub_that_does_not_answer_is_one_sentence_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    before, began = constants.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(UserError, match=r"could not be downloaded .*; pass a local .safetensors file"):
        build_model(small(encoder_weights="hub"), 2, seed=0)
    assert time.monotonic() - began < 20
    assert before == constants.HF_HUB_OFFLINE
