"""Settings of the local model: ranges, default encoders, pairs of models."""

from __future__ import annotations

import pytest
from helpers.settings import assert_refused

from kmine.config import (
    FitConfig,
    InferConfig,
    LoopConfig,
    ModelConfig,
)
from kmine.errors import UserError

OUT_OF_RANGE = [
    (ModelConfig, "encoder_depth", 2),
    (ModelConfig, "encoder_depth", 6),
    (ModelConfig, "decoder_channels", 7),
    (ModelConfig, "levels", 2),
    (ModelConfig, "levels", 5),
    (FitConfig, "steps", 0),
    (FitConfig, "round_steps", 0),
    (FitConfig, "val_every", 0),
    (FitConfig, "batch_size", 1),
    (FitConfig, "labeled_share", 0.0),
    (FitConfig, "lr", 0.0),
    (FitConfig, "warmup", 1.0),
    (FitConfig, "dice_weight", -1.0),
    (FitConfig, "num_workers", -1),
    (FitConfig, "cutmix", -0.1),
    (FitConfig, "cutmix", 1.1),
    (FitConfig, "feature_perturbation", 1.0),
    (FitConfig, "feature_perturbation", -0.1),
    (FitConfig, "ema_decay", 1.0),
    (FitConfig, "ema_decay", float("nan")),
    (FitConfig, "max_empty_share", 1.5),
    (FitConfig, "pseudo_weight", "quality"),
    (InferConfig, "batch_size", 0),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(kind, name, value):
    assert_refused(kind, name, value)


def test_a_strong_view_needs_augmentation():
    with pytest.raises(UserError, match=r"fit\.strong_augment: expected false where fit\.augment is false"):
        FitConfig(augment=False, strong_augment=True)
    assert FitConfig(strong_augment=True).strong_augment


def test_labels_only_resets_the_settings_of_pseudo_masks():
    changed = FitConfig(
        strong_augment=True, feature_perturbation=0.5, pseudo_weight="estimated", max_empty_share=1, labeled_share=0.1
    )
    assert changed.labels_only() == FitConfig()
    assert FitConfig(cutmix=0.5, ema_decay=0.9).labels_only() == FitConfig(cutmix=0.5, ema_decay=0.9)


def test_the_default_encoder_depends_on_the_model():
    assert LoopConfig().model.encoder == "mobilenet_v2"
    assert LoopConfig(model=ModelConfig(name="sks")).model.encoder == "swinv2_tiny_window8_256"
    named = ModelConfig(name="sks", encoder="mobilenetv2_050")
    assert LoopConfig(model=named).model == named


def test_two_names_joined_by_plus_are_local_and_auxiliary_model():
    both = ModelConfig(name="unetpp+sks", encoder="resnet18+mobilenetv2_050", encoder_weights="hub", encoder_depth=3)
    first, second = both.split()
    assert (first.name, first.encoder, first.encoder_weights) == ("unetpp", "resnet18", "hub")
    assert (second.name, second.encoder, second.encoder_weights) == ("sks", "mobilenetv2_050", "hub")
    assert first.encoder_depth == second.encoder_depth == 3
    assert ModelConfig(name="unetpp+sks").resolved().encoder == "mobilenet_v2+swinv2_tiny_window8_256"
    assert ModelConfig(name="unet+unetpp", encoder_weights=None).split()[1].encoder_weights is None
    single = ModelConfig(encoder="resnet18")
    assert single.split() == (single, None)
    with pytest.raises(UserError, match=r"model\.name"):
        ModelConfig(name="unet+unetpp+sks")


def test_settings_of_sks_are_the_same_in_all_runs_of_other_models():
    changed = {"levels": 3, "decoder": "unetpp", "fine_init": "classifier", "veto": True}
    assert ModelConfig("unetpp", **changed).resolved() == ModelConfig("unetpp").resolved()
    assert ModelConfig("unetpp+unet", **changed).resolved() == ModelConfig("unetpp+unet").resolved()
    assert ModelConfig("sks", **changed).resolved().veto
    first, second = ModelConfig("unetpp+sks", **changed).split()
    assert first == ModelConfig("unetpp").resolved() and second == ModelConfig("sks", **changed).resolved()


def test_baseline_models_are_those_of_the_local_model_unless_given():
    assert LoopConfig(model=ModelConfig("sks")).baseline_models == ("unetpp",)
    assert LoopConfig(model=ModelConfig("unetpp+sks")).baseline_models == LoopConfig().baseline_models == ()
    assert LoopConfig(baseline_models=("unet",)).baseline_models == ("unet",)
    with pytest.raises(UserError, match="baseline_models"):
        LoopConfig(baseline_models=("sks",))


def test_the_baseline_model_of_sks_is_its_fine_branch():
    own = ModelConfig("sks", "resnet10t", decoder="unet", veto=True, fine_init="classifier")
    other = own.with_architecture("unetpp")
    assert (other.name, other.decoder, other.veto, other.fine_init) == ("sks", "unetpp", False, "weights")
    assert not (other.skip_feature_share or other.skip_resolution or other.skip_coarse)
    assert ModelConfig("unetpp").with_architecture("unet").name == "unet"
