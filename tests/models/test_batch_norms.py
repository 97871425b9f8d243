"""Folded batch norms are found and restored without a change of the evaluation function; the probe leaves no trace."""

from __future__ import annotations

import pytest
import torch
from helpers.models import fold_norms, make_healthy, save_encoder, small, small_sks, smooth_images
from helpers.small import same

from kmine.errors import UserError
from kmine.models.base import LocalModel
from kmine.models.batch_norms import (
    clear_scaling,
    feature_agreement,
    folded_norms,
    is_untrained,
    restore_norms,
    scaling_agreement,
)
from kmine.models.build import build_model, create_model

IMAGES = smooth_images()


def batch(model: LocalModel) -> torch.Tensor:
    return model.prepare(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))


@pytest.fixture(params=["tu-mobilenetv3_small_050", "mobilenet_v2", "resnet18"])
def healthy(request):
    model = build_model(small(encoder=request.param, decoder_channels=8, encoder_depth=5), 2, seed=0)
    make_healthy(model, IMAGES)
    return model


@torch.no_grad()
def test_folded_norms_are_restored_from_images_alone(healthy):
    encoder = healthy.encoders()[0]
    assert folded_norms(encoder) == [] and not is_untrained(encoder)
    assert min(feature_agreement(healthy, IMAGES).values()) > 0.9
    fold_norms(encoder, batch(healthy))
    folded = encoder.eval()(batch(healthy))
    assert min(feature_agreement(healthy, IMAGES).values()) < 0.5
    norms = [m for m in encoder.modules() if hasattr(m, "running_var")]
    assert len(folded_norms(encoder)) == len(norms) > 15
    restore_norms(healthy, IMAGES)
    assert folded_norms(encoder) == []
    for before, after in zip(folded, encoder.eval()(batch(healthy)), strict=True):
        assert torch.allclose(before, after, atol=1e-4, rtol=1e-4)
    agreement = feature_agreement(healthy, IMAGES)
    assert set(agreement) == {2, 4, 8, 16, 32} and min(agreement.values()) > 0.9


def test_the_probe_changes_nothing(healthy):
    before, state = {k: v.clone() for k, v in healthy.state_dict().items()}, torch.random.get_rng_state()
    modes = [module.training for module in healthy.modules()]
    feature_agreement(healthy, IMAGES)
    scaling_agreement(healthy, IMAGES, ("half",))
    assert same(before, healthy.state_dict()) and torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in healthy.modules()]


def test_an_untrained_network_is_not_a_folded_one():
    encoder = build_model(small(), 2, seed=0).encoders()[0]
    assert is_untrained(encoder) and folded_norms(encoder) == []


@pytest.mark.parametrize("scaling", ["half", "imagenet", "unit"])
def test_the_scaling_is_the_one_under_which_both_modes_agree(scaling):
    model = build_model(small(normalization=scaling), 2, seed=0)
    make_healthy(model, IMAGES)
    agreement = scaling_agreement(model, smooth_images(seed=5), ("half", "imagenet", "unit"))
    assert clear_scaling(agreement) == scaling
    assert clear_scaling({}) is clear_scaling({"half": 0.9}) is clear_scaling({"half": 0.9, "unit": 0.89}) is None
    assert scaling_agreement(build_model(small(), 2, seed=0), IMAGES, ("half",)) == {}, "untrained"


def test_without_images_folded_weights_are_refused_with_the_cure(tmp_path):
    path, settings = tmp_path / "e.safetensors", {"encoder": "tu-mobilenetv3_small_050", "decoder_channels": 8}
    donor = build_model(small(), 2, seed=0)
    encoder = make_healthy(donor, IMAGES)
    fold_norms(encoder, batch(donor))
    save_encoder(path, encoder, normalization="half")
    with pytest.raises(UserError, match=r"were folded .*images=ARRAY"):
        create_model("unet", encoder_weights=str(path), **settings)
    model = create_model("unet", encoder_weights=str(path), images=IMAGES, **settings)
    assert min(feature_agreement(model, IMAGES).values()) > 0.9


def test_both_encoders_of_sks_are_restored(tmp_path):
    donor = build_model(small_sks(), 2, seed=0)
    encoder = make_healthy(donor, IMAGES)
    fold_norms(encoder, batch(donor))
    donor.net.coarse.pyramid.load_state_dict(encoder.state_dict())
    restore_norms(donor, IMAGES)
    assert same(donor.net.fine.state_dict(), donor.net.coarse.pyramid.state_dict())
    assert min(feature_agreement(donor, IMAGES).values()) > 0.9
