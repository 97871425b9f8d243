"""Local models by name: public factory, seeds, checkpoints, errors."""

from __future__ import annotations

import doctest

import pytest
import torch
from helpers.models import small
from helpers.small import same

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.models import build
from kmine.models.build import build_model, create_model, load_checkpoint


def test_initial_weights_follow_the_seed_without_effect_on_the_global_generator():
    before = torch.random.get_rng_state()
    a, b, c = (build_model(small(), 2, seed=s).state_dict() for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_create_model_is_build_model_with_the_defaults_of_the_settings():
    created = create_model("unet", encoder="tu-mobilenetv3_small_050", classes=3, seed=4, decoder_channels=16)
    assert same(created.state_dict(), build_model(small(name="unet"), 3, seed=4).state_dict())
    assert type(create_model().net).__name__ == "UnetPlusPlus"
    assert doctest.testmod(build, extraglobs={"torch": torch}).failed == 0


def test_a_checkpoint_is_loaded_without_the_encoder_weights_of_the_settings():
    weights = build_model(small(), 2, seed=5).state_dict()
    model = load_checkpoint(small(encoder_weights="no such file.safetensors"), 2, weights)
    assert same(model.state_dict(), weights) and not model.training
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(small(), 3, weights)


def test_unknown_names_suggest_the_nearest_and_offline_forbids_the_hub():
    with pytest.raises(UserError, match=r"did you mean unetpp\?"):
        create_model("unetp")
    with pytest.raises(UserError, match=r"did you mean mobilenet_v2\?"):
        build_model(ModelConfig(encoder="mobilnet_v2"), 2, seed=0)
    with pytest.raises(UserError, match="cannot be built"):
        build_model(ModelConfig(encoder="tu-no_such_net"), 2, seed=0)
    with pytest.raises(UserError, match="--offline forbids"):
        build_model(small(encoder_weights="hub"), 2, seed=0, offline=True)
