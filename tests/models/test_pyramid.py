"""Encoders run by stages give the features of timm's own, Swin-v2 at any size included."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import scramble
from torch import nn

from kmine.errors import UserError
from kmine.models.pyramid import Pyramid, create_encoder

TINY_SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "features_only": True}


def swin(**settings: object) -> nn.Module:
    return timm.create_model("swinv2_tiny_window8_256", **TINY_SWIN, **settings).eval()


def scrambled_swin() -> nn.Module:
    """Swin-v2's norms are initialized with zero, which would hide the attention."""
    encoder = swin(strict_img_size=False)
    scramble(encoder, seed=5)
    return encoder


def windows(pyramid: Pyramid) -> list[tuple[int, int]]:
    """(window side, shift of the second block) of each level."""
    layers = [stage.parts[-1] for stage in pyramid.stages]
    return [(layer.blocks[1].window_size[0], layer.blocks[1].shift_size[0]) for layer in layers]


NAMES = ("mobilenetv2_050", "mobilenetv3_small_050", "resnet10t", "resnet18", "convnext_atto", "pvt_v2_b0")


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_timm_s(name):
    encoder = create_encoder(name).eval()
    pyramid = Pyramid(encoder, name, 32).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        ours, expected = pyramid(x), encoder(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert [f.shape[1] for f in ours] == list(pyramid.channels)
    assert [96 // f.shape[2] for f in ours] == [64 // f.shape[3] for f in ours] == list(pyramid.strides)


@pytest.mark.parametrize("deepest", [16, 32])
@pytest.mark.parametrize("sides", [(64, 64), (96, 96), (64, 160), (256, 256), (512, 512)])
def test_swin_v2_equals_timm_s_for_that_image_size(sides, deepest):
    encoder = scrambled_swin()
    reference = swin(img_size=sides)
    reference.load_state_dict(encoder.state_dict())
    pyramid = Pyramid(encoder, "swin", deepest).eval()
    assert pyramid.channels == (8, 16, 32, 64)[: len(pyramid.strides)]
    x = torch.randn(1, 3, *sides)
    with torch.no_grad():
        for ours, expected in zip(pyramid(x), reference(x), strict=False):
            assert torch.allclose(ours, expected.permute(0, 3, 1, 2), atol=1e-5)


def test_windows_follow_the_size_of_the_input():
    pyramid = Pyramid(swin(strict_img_size=False), "swin", 32)
    expected = {
        64: [(8, 4), (8, 0), (4, 0), (2, 0)],
        128: [(8, 4), (8, 4), (8, 0), (4, 0)],
        256: [(8, 4), (8, 4), (8, 4), (8, 0)],
        512: [(8, 4), (8, 4), (8, 4), (8, 4)],
    }
    for side in (64, 128, 256, 512, 256, 64):
        with torch.inference_mode():
            pyramid(torch.zeros(1, 3, side, side))
        assert windows(pyramid) == expected[side], side


def test_a_size_first_used_in_inference_mode_can_be_used_in_training():
    pyramid = Pyramid(scrambled_swin(), "swin", 32)
    with torch.inference_mode():
        pyramid(torch.zeros(1, 3, 96, 96))
    pyramid(torch.zeros(1, 3, 96, 96))[-1].sum().backward()
    assert all(weight.grad is not None for weight in pyramid.parameters())


def test_other_window_sizes_do_not_change_the_weights():
    pyramid = Pyramid(scrambled_swin(), "swin", 32).eval()
    x, before = torch.randn(1, 3, 96, 96), {k: v.clone() for k, v in pyramid.state_dict().items()}
    with torch.no_grad():
        first = pyramid(x)[-1]
        pyramid(torch.randn(1, 3, 160, 64))
        assert torch.equal(pyramid(x)[-1], first)
    after = pyramid.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_verification_keeps_mode_and_statistics_of_the_encoder():
    encoder = create_encoder("mobilenetv2_050")
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    pyramid = Pyramid(encoder, "mobilenetv2_050", 16)
    assert encoder.training and all(m.training for m in pyramid.modules())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_missing_level_is_an_error_that_lists_the_strides():
    encoder = create_encoder("mobilenetv2_050")
    with pytest.raises(UserError, match="has features at strides 2, 4, 8, 16, 32, none at 64"):
        Pyramid(encoder, "mobilenetv2_050", 64)
