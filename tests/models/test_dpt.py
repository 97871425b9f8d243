"""DPT over plain vision transformers: strides, weights as timm publishes them, encoders that do not fit."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from kmine.errors import UserError
from kmine.models.build import create_model
from kmine.models.dpt import DptNet

TINY = {"decoder_width": 1, "classes": 3}


@pytest.mark.parametrize(("patch", "sides"), [(16, (64, 96)), (14, (56, 84))])
def test_a_token_stands_for_16_pixels_whatever_the_patch(patch, sides, monkeypatch):
    vit = timm.models.vision_transformer.VisionTransformer
    small = vit(patch_size=patch, embed_dim=8, depth=4, num_heads=1, num_classes=0, dynamic_img_size=True, img_size=112)
    small.pretrained_cfg = {}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: small)
    net, seen = DptNet("tu-anything", 1, 3), []
    net.encoder.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out[0][-1].shape)))
    assert net(torch.rand(2, 3, 64, 96)).shape == (2, 3, 64, 96)
    assert seen == [((2, 3, *sides), (2, 8, 4, 6))]
    net(torch.rand(2, 3, 64, 96)).sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())


def test_weights_are_those_of_timm_and_the_head_is_left_out(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("test_vit", num_classes=7, dynamic_img_size=True).eval()
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors")
    model = create_model("dpt", encoder="test_vit", encoder_weights=weights, **TINY).eval()
    x = torch.rand(1, 3, 64, 32)
    found = model.net.encoder(x)[0][-1]
    assert torch.equal(found, whole.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0])
    assert found.shape[2:] == (4, 2) and model(torch.rand(1, 3, 50, 33)).shape == (1, 3, 50, 33)
    assert model.encoders() == [model.net.encoder]


def test_feature_dropout_spares_the_tokens_without_a_place():
    model, seen = create_model("dpt", encoder="tu-test_vit", **TINY), []
    model.net.decoder.projection_blocks[0].register_forward_hook(lambda _, args, out: seen.append(args))
    with model.feature_dropout(torch.tensor([True, False]), 0.5):
        model(torch.rand(2, 3, 32, 32))
    (places, tokens), dropped = seen[0], (seen[0][0] == 0).all(dim=(2, 3)).sum(dim=1)
    assert dropped[0] > 0 and dropped[1] == 0 and places.ndim == 4
    assert tokens.ndim == 3 and not (tokens == 0).all(dim=1).any()


@pytest.mark.parametrize("encoder", ["tu-resnet18", "resnet18", "tu-swin_tiny_patch4_window7_224"])
def test_an_encoder_that_is_no_plain_transformer_is_one_error(encoder):
    with pytest.raises(UserError, match="dpt, which takes plain vision transformers of timm"):
        create_model("dpt", encoder=encoder)


def test_convnext_is_an_encoder_of_unet():
    model = create_model("unet", encoder="tu-test_convnext", encoder_depth=4)
    assert model(torch.rand(2, 3, 40, 64)).shape == (2, 2, 40, 64)
