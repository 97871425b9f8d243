"""The local model: sizes of its output, scaling of its input, feature dropout."""

from __future__ import annotations

import pytest
import torch
from helpers.models import small, small_sks

from kmine.config import ModelConfig
from kmine.models.base import LocalModel, decoder_channels
from kmine.models.build import build_model


@pytest.mark.parametrize("name", ["unet", "unetpp", "sks"])
@pytest.mark.parametrize("sides", [(64, 64), (50, 71), (33, 96)])
def test_logits_have_the_size_of_the_image(name, sides):
    model = build_model(small(name=name), 3, seed=0).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, 3, *sides, dtype=torch.uint8))
    assert logits.shape == (2, 3, *sides) and logits.dtype == torch.float32


@pytest.mark.parametrize(("scaling", "expected"), [("half", 0.0), ("imagenet", (127.5 - 123.675) / 58.395)])
def test_scaling_is_inside_the_model(scaling, expected):
    model = build_model(small(normalization=scaling), 2, seed=0)
    inputs = []
    model.net.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.eval()(torch.full((1, 3, 32, 32), 127.5))
    assert inputs[0][0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(params=["unet", "unetpp", "sks"])
def model(request):
    return build_model(small(name=request.param), 2, seed=0)


IMAGES = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PSEUDO = torch.tensor([False, True, False, True])


def features(model, images, rate, seed=1):
    """Input of the decoder, finest level first, with feature dropout for `images`."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = []
    torch.manual_seed(seed)
    with model.feature_dropout(images, rate):
        # Registered last, so that it runs after the hook of feature dropout.
        handle = model.net.decoder.register_forward_pre_hook(lambda _, args: inputs.extend(f.detach() for f in args[0]))
        model(IMAGES)
        handle.remove()
    model.load_state_dict(state)  # the running averages of batch norm
    return inputs


def test_feature_dropout_drops_whole_channels_of_the_given_images_only(model):
    model.train()
    plain, dropped = features(model, None, 0.5), features(model, PSEUDO, 0.5)
    lost = total = 0
    for before, after in zip(plain, dropped, strict=True):
        assert torch.equal(before[~PSEUDO], after[~PSEUDO])
        alive = after[PSEUDO].abs().amax(dim=(2, 3)) > 0
        assert torch.equal(after[PSEUDO], 2 * before[PSEUDO] * alive[:, :, None, None]), (
            "whole channels, or twice as much"
        )
        could = before[PSEUDO].abs().amax(dim=(2, 3)) > 0
        lost, total = lost + int((could & ~alive).sum()), total + int(could.sum())
    assert 0.4 < lost / total < 0.6


def test_feature_dropout_follows_the_seed_and_ends_with_its_block(model):
    model.train()
    one, again, other = (features(model, PSEUDO, 0.3, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(RuntimeError), model.feature_dropout(PSEUDO, 0.3):
        raise RuntimeError
    plain = features(model, None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(plain, features(model, PSEUDO, 0.0), strict=True))
    model.eval()
    without, dropped = features(model, None, 0.3), features(model, PSEUDO, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(without, dropped, strict=True)), "no dropout in eval mode"


class Mean(torch.nn.Module):
    """Two logits from the channels; records the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return torch.stack([x[:, 0], x.mean(dim=1)], dim=1)


def test_large_images_are_predicted_in_patches_in_eval_mode_only():
    model = LocalModel(Mean(), 2, 1, "half").eval()
    whole = model(IMAGES)
    model.patch = 32
    in_patches = model(IMAGES)
    assert torch.allclose(in_patches, whole, atol=1e-4), "a network of single pixels does not see the patches"
    assert set(model.net.sizes[1:]) == {(32, 32)}
    model.train()(IMAGES)
    assert model.net.sizes[-1] == (64, 64)
    model.eval()(IMAGES[..., :32, :32])
    assert model.net.sizes[-1] == (32, 32)


def test_decoders_have_equal_channels_at_equal_strides():
    wide = ModelConfig(decoder_width=16)
    assert decoder_channels(wide, [16, 8, 4, 2, 1]) == (256, 128, 64, 32, 16), "the width of smp"
    assert decoder_channels(ModelConfig(), [8, 4, 2, 1]) == (64, 32, 16, 8)
    older = ModelConfig(decoder_channels=64)
    assert decoder_channels(older, [8, 4, 2, 1]) == decoder_channels(ModelConfig(), [8, 4, 2, 1])
    assert decoder_channels(older, [16, 8, 4, 2, 1]) == (64, 32, 16, 8, 8)


@pytest.mark.parametrize("cfg", [small(name="unet"), small(), small_sks(), ModelConfig("dpt", "tu-test_vit")])
def test_pooled_features_are_means_of_the_deepest_level_whatever_the_size_of_the_image(cfg):
    model = build_model(cfg, 2, 0).eval()
    images = torch.randint(0, 256, (2, 3, 40, 72), dtype=torch.uint8)
    found = model.pooled_features(images)
    assert found.shape[0] == 2 and torch.equal(found, model.with_patch(32).pooled_features(images))
    if cfg.name in ("unet", "unetpp"):
        assert torch.equal(found, model.net.encoder(model.prepare(images))[-1].mean(dim=(2, 3)))
    assert not model.net.decoder._forward_pre_hooks
