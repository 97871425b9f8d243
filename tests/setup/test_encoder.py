"""Encoder weights of a run: found, recorded, examined, and kept when the run is resumed."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace

import pytest
import yaml
from helpers.hub_cache import hub_file
from helpers.models import fold_norms, make_healthy, save_encoder, smooth_images
from helpers.small import CFG, Silent

from kmine.config import ModelConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.models.batch_norms import feature_agreement
from kmine.models.build import build_model
from kmine.setup.open import begin_run
from kmine.store.run_folder import RunFolder
from kmine.training.model_setup import new_model
from kmine.training.trainer import train

IMAGES = smooth_images(size=32)
ENCODER = "tu-mobilenetv3_small_050"


@pytest.fixture
def path(tmp_path):
    """A healthy encoder that expects imagenet."""
    file = tmp_path / "e.safetensors"
    save_encoder(file, make_healthy(donor("imagenet"), IMAGES))
    return file


def donor(scaling: str):
    return build_model(replace(CFG.model, normalization=scaling), 2, seed=0)


@pytest.fixture
def begin(tmp_path):
    def begin(folder: str = "run", **settings: object):
        listener = Silent()
        data, model = (
            replace(CFG.data, cache_dir=str(tmp_path / "cache")),
            replace(CFG.model, **({"encoder_weights": "auto"} | settings)),
        )
        cfg = replace(CFG, data=data, model=model)
        with closing(RunFolder(tmp_path / folder)) as run:
            task = begin_run(cfg, open_source(cfg.data), run, listener, method="supervised")
        return task, listener.said, yaml.safe_load((tmp_path / folder / "config.yaml").read_text())["model"]

    return begin


def test_without_weights_in_a_cache_training_begins_with_random_ones_and_one_line_says_so(begin):
    task, said, saved = begin()
    (line,) = [line for line in said if "random" in line]
    assert f"kmine weights get encoder:{ENCODER}" in line
    assert (saved["encoder_weights"], saved["encoder_sha256"], saved["normalization"]) == (None, None, "half")
    assert not task.cfg.model.is_pretrained and "encoder" not in task.run.run()
    assert begin("other", encoder_weights=None)[1] == [line for line in said if "random" not in line]


def test_weights_in_a_cache_are_taken_recorded_and_kept(begin, path, tmp_path, monkeypatch):
    cached = hub_file(monkeypatch, tmp_path / "hub", ENCODER)
    shutil.copy(path, cached)
    task, said, saved = begin()
    assert saved["encoder_weights"] == str(cached) and saved["encoder_sha256"] == sha256_of(path)
    assert task.cfg.model.is_pretrained and sum(str(cached) in line for line in said) == 1
    record = task.run.run()["encoder"][0]
    assert record["sha256"] == sha256_of(path) and record["file"] == str(cached)
    first = train(task, new_model(task), round_idx=0)
    cached.unlink()
    task, said, saved = begin()
    assert saved["encoder_weights"] == str(cached) and not any("random" in line for line in said)
    assert train(task, new_model(task), round_idx=0).signature == first.signature, "not needed once round 0 is trained"
    task = replace(task, signature="other")
    with pytest.raises(UserError, match=rf"no file {cached}"):
        train(task, new_model(task), round_idx=0)
    with pytest.raises(UserError, match=r"model\.encoder_weights = .*, this command has None"):
        begin(encoder_weights=None)
    assert begin(encoder_weights=str(path))[2]["encoder_weights"] == str(path), "the same file elsewhere"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    task = begin()[0]
    with pytest.raises(UserError, match=r"expected .* with SHA-256 .*, got .*; restore that file"):
        train(replace(task, signature="other"), new_model(task), round_idx=0)


def test_a_run_of_before_these_settings_goes_on_as_it_began(begin, tmp_path):
    task = begin()[0]
    signature = train(task, new_model(task), round_idx=0).signature
    file = tmp_path / "run" / "config.yaml"
    old = yaml.safe_load(file.read_text())
    for name in ("encoder_sha256", "force_normalization"):
        del old["model"][name]
    file.write_text(yaml.safe_dump(old))
    task, _, saved = begin()
    assert train(task, new_model(task), round_idx=0).signature == signature
    assert saved["normalization"] == "half" and saved["encoder_weights"] is None


def test_the_scaling_follows_the_weights(begin, path):
    task, _, saved = begin(encoder_weights=str(path))
    assert saved["normalization"] == task.cfg.model.normalization
    stated = path.with_name("stated.safetensors")
    save_encoder(stated, make_healthy(donor("imagenet"), IMAGES), normalization="clip")
    task, _, saved = begin("stated", encoder_weights=str(stated))
    assert saved["normalization"] == "clip" and task.run.run()["encoder"][0]["normalization_from"] == "stated"
    with pytest.raises(UserError, match=r"half was given, but .* expects clip \(stated\); leave it at auto, or add"):
        begin("refused", encoder_weights=str(stated), normalization="half")
    forced = begin("refused", encoder_weights=str(stated), normalization="half", force_normalization=True)
    assert forced[2]["normalization"] == "half"
    assert forced[0].run.run()["encoder"][0]["normalization_from"] == "given"


def test_folded_norms_are_restored_and_said_once(begin, tmp_path):
    model = donor("half")
    encoder = make_healthy(model, IMAGES)
    x = model.prepare(build_images())
    fold_norms(encoder, x)
    save_encoder(tmp_path / "folded.safetensors", encoder)
    task, said, saved = begin(encoder_weights=str(tmp_path / "folded.safetensors"))
    record = task.run.run()["encoder"][0]
    assert sum("were folded" in line for line in said) == 1
    assert saved["normalization"] == "imagenet" and record["normalization_from"] == "published"
    restored = new_model(task)
    assert min(feature_agreement(restored, task_images(task)).values()) > 0.9
    for name, value in new_model(task).state_dict().items():
        assert value.equal(restored.state_dict()[name])


def test_weights_whose_features_differ_in_training_are_a_named_warning(begin, path):
    model = donor("half")
    encoder = make_healthy(model, IMAGES)
    for module in encoder.modules():
        if hasattr(module, "running_var"):
            module.running_var.mul_(1e-3)
            module.running_mean.add_(5)
    save_encoder(path, encoder)
    task, said, _ = begin(encoder_weights=str(path))
    record = task.run.run()["encoder"][0]
    low = [float(value) for value in record["agreement"].values() if value < 0.5]
    assert low and f"{low[0]:.2f} at stride" in record["messages"]["modes_disagree"]
    assert sum(line.startswith("warning: features of") for line in said) == 1


def test_an_untrained_file_is_said_to_be_one(begin, path):
    save_encoder(path, build_model(CFG.model, 2, seed=0).net.encoder)
    said = begin(encoder_weights=str(path))[1]
    assert any("holds an untrained network" in line for line in said)


def test_two_models_have_weights_of_their_own(begin, path):
    both = {"name": "unetpp+unet", "encoder": f"{ENCODER}+resnet18", "encoder_weights": f"{path}+none"}
    task, _, saved = begin(**both)
    assert task.cfg.model.encoder_sha256 == sha256_of(path) and task.auxiliary_model.encoder_sha256 is None
    assert task.auxiliary_model.normalization == "half" and saved["encoder_sha256"] == f"{sha256_of(path)}+"
    assert ModelConfig(**saved).split()[1] == task.auxiliary_model


def build_images():
    import torch

    return torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


def task_images(task):
    from kmine.data.pool import spaced_images

    return spaced_images((task.labeled, task.unlabeled), 16)
