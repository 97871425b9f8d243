"""Rules: what data and machine decide."""

from __future__ import annotations

from dataclasses import replace

from helpers.plan_facts import CPU, DATA, GPU

from kmine import cli
from kmine.config import DataConfig, LoopConfig, ModelConfig
from kmine.plan import rules
from kmine.plan.rules import (
    PLANNED,
    cheaper,
    needed_side,
    network_choices,
    own_data_choices,
    patch_choices,
    shape_choices,
    sizes,
    step_choices,
)


def values(choices):
    return {choice.setting: choice.value for choice in choices}


def test_every_choice_is_a_setting_of_the_loop():
    settings = cli.flat(cli.to_dict(LoopConfig()))
    assert set(PLANNED) <= settings.keys()
    for machine in (CPU, GPU):
        found = [*network_choices(LoopConfig(), DATA, machine), *step_choices(8, DATA, machine)]
        assert {choice.setting for choice in found} <= set(PLANNED)
        assert all(choice.why for choice in found)


def test_a_gpu_gets_the_usual_network_and_a_cpu_a_small_one(monkeypatch):
    monkeypatch.setattr(rules, "cached_weights", lambda *_: None)
    small, large = (values(network_choices(LoopConfig(), DATA, machine)) for machine in (CPU, GPU))
    assert (small["model.encoder"], large["model.encoder"]) == ("mobilenet_v2", "resnet34")
    assert (small["fit.precision"], large["fit.precision"]) == ("32", "bf16")
    assert (small["fit.num_workers"], large["fit.num_workers"]) == (0, 4)
    sks = LoopConfig(model=ModelConfig("sks"))
    assert values(network_choices(sks, DATA, GPU))["model.encoder"] == "swinv2_tiny_window8_256"


def test_weights_decide_the_encoder(tmp_path, monkeypatch):
    file = LoopConfig(model=ModelConfig(encoder_weights="mine.safetensors"))
    assert "model.encoder" not in values(network_choices(file, DATA, GPU)), "they are of one encoder"
    monkeypatch.setattr(rules, "cached_weights", lambda name, _: tmp_path if name == "mobilenet_v2" else None)
    assert values(network_choices(LoopConfig(), DATA, GPU))["model.encoder"] == "mobilenet_v2"
    hub = LoopConfig(model=ModelConfig(encoder_weights="hub"))
    assert values(network_choices(hub, DATA, GPU))["model.encoder"] == "resnet34"


def test_more_labels_get_more_steps_and_nothing_unlabeled_no_rounds():
    few, many = (values(step_choices(8, replace(DATA, num_labeled=n), CPU)) for n in (20, 200))
    assert (few["fit.steps"], few["fit.round_steps"], few["rounds"]) == (600, 300, 2)
    assert many["fit.steps"] == 1200
    assert values(step_choices(8, replace(DATA, num_unlabeled=0), CPU))["rounds"] == 0


def test_a_side_is_usual_unless_images_are_smaller_or_objects_need_more():
    assert sizes(DATA, CPU)[0][0] == 256
    assert sizes(DATA, GPU)[0][0] == 352
    assert sizes(replace(DATA, height=100, width=90), GPU)[0][0] == 128
    small = replace(DATA, small_object_px=10.0)
    assert needed_side(small) == 512 == sizes(small, CPU)[0][0]
    assert needed_side(replace(DATA, small_object_px=float("nan"))) == 0
    assert sizes(DATA, CPU)[0] == sorted(sizes(DATA, CPU)[0], reverse=True)


def test_sides_that_differ_much_are_not_squashed():
    assert values(shape_choices(DATA))["data.resize"] == "squash"
    assert values(shape_choices(replace(DATA, aspect_high=1.6)))["data.resize"] == "letterbox"
    assert values(shape_choices(replace(DATA, aspect_low=0.5)))["data.resize"] == "letterbox"


def test_patches_where_small_objects_would_vanish():
    cfg, small = LoopConfig(data=DataConfig(size=128)), replace(DATA, small_object_px=10.0)
    assert not list(patch_choices(cfg, DATA))
    assert values(patch_choices(cfg, small)) == {"data.patch": 128, "data.size": 512}
    assert values(patch_choices(cfg, replace(small, height=256, width=256))) == {"data.patch": 128, "data.size": 224}
    assert not list(patch_choices(cfg, replace(small, height=180, width=180))), "hardly more than the whole image"
    assert not list(patch_choices(replace(cfg, model=ModelConfig("sks")), small))


def test_only_own_files_are_divided_otherwise():
    assert not list(own_data_choices(LoopConfig()))
    own = values(own_data_choices(LoopConfig(data=DataConfig(name="folder"))))
    assert own == {"data.label_fraction": 1.0, "data.val_fraction": 0.2}


def test_what_was_given_is_not_made_cheaper():
    assert [next(c.setting for c in group) for group in cheaper(LoopConfig(), ())] == ["rounds", "fit.steps"]
    left = {c.setting for group in cheaper(LoopConfig(), {"rounds", "fit.steps"}) for c in group}
    assert left == {"fit.round_steps"}
