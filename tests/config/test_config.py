"""Settings check themselves, and every one of them is explained."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from helpers.sources import documented

from kmine import config
from kmine.config import (
    DataConfig,
    FitConfig,
    FixmatchConfig,
    GateConfig,
    InferConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    RefineConfig,
    SegmenterConfig,
    TeacherConfig,
)
from kmine.errors import UserError

CLASSES = [kind for kind in vars(config).values() if is_dataclass(kind)]
OUT_OF_RANGE = [
    (LoopConfig, "rounds", -1),
    (LoopConfig, "seed", -1),
    (LoopConfig, "seed", 2**31),
    (LoopConfig, "adopt_tolerance", -0.1),
    (DataConfig, "num_samples", 0),
    (DataConfig, "size", 31),
    (DataConfig, "size", 4097),
    (DataConfig, "label_fraction", 0.0),
    (DataConfig, "label_fraction", 1.01),
    (DataConfig, "label_fraction", float("nan")),
    (DataConfig, "val_fraction", -0.1),
    (DataConfig, "val_fraction", 1.0),
    (DataConfig, "test_fraction", 1.0),
    (DataConfig, "every_nth", 0),
    (DataConfig, "window", (240.0, -160.0)),
    (DataConfig, "window", (0.0, float("inf"))),
    (DataConfig, "image_labels", ""),
    (DataConfig, "normal_images", ""),
    (DataConfig, "classes", ()),
    (DataConfig, "classes", ("Normal", "Normal")),
    (DataConfig, "classes", ("Normal", "normal")),
    (DataConfig, "fine_groups", 0.0),
    (DataConfig, "fine_groups", -1.0),
    (DataConfig, "fine_groups", 2.5),
    (DataConfig, "fine_groups", float("nan")),
    (DataConfig, "duplicate_distance", -2),
    (DataConfig, "duplicate_distance", 64),
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
    (PromptsConfig, "min_area_px", 0),
    (PromptsConfig, "min_area_fraction", -0.1),
    (PromptsConfig, "box_margin", 1.1),
    (PromptsConfig, "num_jitters", 17),
    (PromptsConfig, "jitter", 0.5),
    (SegmenterConfig, "batch_size", 0),
    (GateConfig, "min_predicted_iou", 1.1),
    (GateConfig, "min_stability", -0.1),
    (GateConfig, "min_agreement", 2.0),
    (GateConfig, "min_jitter_dice", 2.0),
    (GateConfig, "min_confidence", 2.0),
    (GateConfig, "max_area_ratio", 1.0),
    (RefineConfig, "min_vote", 0.5),
    (RefineConfig, "min_vote", 1.1),
    (TeacherConfig, "weight", -1.0),
    (TeacherConfig, "weight", float("inf")),
    (TeacherConfig, "ramp_up", 1.1),
    (TeacherConfig, "decay", 0.0),
    (TeacherConfig, "decay", 1.0),
    (FixmatchConfig, "weight", -1.0),
    (FixmatchConfig, "weight", float("nan")),
    (FixmatchConfig, "threshold", 1.1),
    (FixmatchConfig, "cutmix", -0.1),
    (FixmatchConfig, "feature_perturbation", 1.0),
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_are_valid_and_frozen(kind):
    built = kind()
    with pytest.raises(FrozenInstanceError):
        setattr(built, fields(kind)[0].name, 0)


@pytest.mark.parametrize("kind", [k for k in CLASSES if k is not LoopConfig], ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind):
    assert {f.name for f in fields(kind)} == set(documented(kind.__name__))


def test_every_plain_field_of_the_whole_is_documented():
    sections = {f.name for f in fields(LoopConfig) if isinstance(getattr(LoopConfig(), f.name), tuple(CLASSES))}
    assert {f.name for f in fields(LoopConfig)} - sections == set(documented("LoopConfig"))


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(kind, name, value):
    section = "" if kind is LoopConfig else kind.__name__.removesuffix("Config").lower() + "."
    with pytest.raises(UserError) as error:
        kind(**{name: value})
    assert str(error.value).startswith(f"{section}{name}: expected ")
    assert repr(value) in str(error.value)


def test_validation_and_test_must_leave_training_images():
    with pytest.raises(UserError, match=r"data\.val_fraction \+ data\.test_fraction: expected less than 1"):
        DataConfig(val_fraction=0.5, test_fraction=0.5)


def test_prompts_need_a_box_or_points():
    with pytest.raises(UserError, match=r"prompts\.box, prompts\.points: expected at least one"):
        PromptsConfig(box=False, points=False)
    assert PromptsConfig(box=False, points=True).points


def test_a_strong_view_needs_augmentation():
    with pytest.raises(UserError, match=r"fit\.strong_augment: expected false where fit\.augment is false"):
        FitConfig(augment=False, strong_augment=True)
    assert FitConfig(strong_augment=True).strong_augment


def test_without_pseudo_masks_what_concerns_them_is_as_by_default():
    changed = FitConfig(
        strong_augment=True, feature_perturbation=0.5, pseudo_weight="estimated", max_empty_share=1, labeled_share=0.1
    )
    assert changed.labels_only() == FitConfig()
    assert FitConfig(cutmix=0.5, ema_decay=0.9).labels_only() == FitConfig(cutmix=0.5, ema_decay=0.9)


def test_an_encoder_not_named_is_the_one_that_suits_the_model():
    assert LoopConfig().model.encoder == "mobilenet_v2"
    assert LoopConfig(model=ModelConfig(name="sks")).model.encoder == "swinv2_tiny_window8_256"
    named = ModelConfig(name="sks", encoder="mobilenetv2_050")
    assert LoopConfig(model=named).model is named


def test_two_models_joined_by_a_plus_are_the_local_model_and_its_witness():
    both = ModelConfig(name="unetpp+sks", encoder="resnet18+mobilenetv2_050", encoder_weights="hub", encoder_depth=3)
    first, second = both.split()
    assert (first.name, first.encoder, first.encoder_weights) == ("unetpp", "resnet18", "hub")
    assert (second.name, second.encoder, second.encoder_weights) == ("sks", "mobilenetv2_050", "hub")
    assert first.encoder_depth == second.encoder_depth == 3
    assert ModelConfig(name="unetpp+sks").resolved().encoder == "mobilenet_v2+swinv2_tiny_window8_256"
    assert ModelConfig(name="unet+unetpp").split()[1].encoder_weights is None
    alone = ModelConfig(encoder="resnet18")
    assert alone.split() == (alone, None)
    with pytest.raises(UserError, match=r"model\.name"):
        ModelConfig(name="unet+unetpp+sks")
