"""Published encoder weights: sources, scalings, caches; no network."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from helpers.hub_cache import COMMIT, hub_file
from safetensors.torch import save

from kmine.config.model import SCALINGS
from kmine.errors import UserError
from kmine.models.encoder_hub import (
    EncoderRecord,
    cached_weights,
    encoder_name,
    encoder_path,
    encoder_record,
    fetch_encoder,
    published_scaling,
    require_recorded,
    scaling_name,
    source_of,
    weights_name,
)

CONTENT = save({"a": torch.zeros(2)})
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_names_tell_the_libraries_apart():
    assert weights_name("unet", "resnet34") == "resnet34" and weights_name("unet", "tu-resnet34") == "tu-resnet34"
    assert weights_name("sks", "resnet34") == weights_name("sks", "tu-resnet34") == "tu-resnet34"
    assert source_of("resnet34").repo == "smp-hub/resnet34.imagenet" and source_of("resnet34").revision
    assert source_of("tu-resnet34").repo == "timm/resnet34.a1_in1k" and source_of("tu-resnet34").revision is None
    assert source_of("mobilenet_v2").url.endswith("mobilenet_v2-b0353104.pth")
    assert source_of("no_such") is None and source_of("tu-no_such") is None


def test_scalings_of_publishers_have_names():
    expected = {"resnet34": "imagenet", "tu-inception_v3": "half", "tu-vit_base_patch16_clip_224": "clip"}
    expected |= {"dpn68": "dpn", "tu-dpn68": "dpn", "xception": "half", "tu-no_such": None}
    expected |= {"tu-tf_efficientnet_lite0": "half", "timm-tf_efficientnet_lite0": "half"}
    assert {name: published_scaling(name) for name in expected} == expected
    assert all(scaling_name(*values) == name for name, values in SCALINGS.items())
    assert scaling_name([0.1] * 3, [1] * 3) is None and scaling_name("abc", None) is None


def test_every_scaling_that_timm_publishes_is_known():
    from timm.models import get_pretrained_cfg, list_pretrained

    assert [n for n in list_pretrained() if not scaling_name((c := get_pretrained_cfg(n)).mean, c.std)] == []


def test_weights_in_the_hub_s_cache_are_kept_with_their_record(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    file = hub_file(monkeypatch, tmp_path / "hub", "resnet34", mean=[0.5] * 3, std=[0.5] * 3)
    assert cached_weights("resnet34", folder) is None
    file.write_bytes(CONTENT)
    assert cached_weights("resnet34", folder) == file and not folder.exists()
    path = fetch_encoder("resnet34", folder, offline=True)
    assert path == encoder_path(folder, "resnet34") == cached_weights("resnet34", folder)
    assert path.read_bytes() == CONTENT and require_recorded(path) == EncoderRecord(
        SHA256, "https://huggingface.co/smp-hub/resnet34.imagenet", source_of("resnet34").revision, "half"
    )
    path.write_bytes(CONTENT[:-1])
    for wrong in (lambda: cached_weights("resnet34", folder), lambda: fetch_encoder("resnet34", folder)):
        with pytest.raises(UserError, match=r"remove the file and run `kmine weights get encoder:resnet34`"):
            wrong()


def test_timm_s_weights_are_recorded_with_their_commit(tmp_path, monkeypatch):
    hub_file(monkeypatch, tmp_path / "hub", "tu-resnet18").write_bytes(CONTENT)
    record = encoder_record(fetch_encoder("tu-resnet18", tmp_path, offline=True))
    assert (record.revision, record.normalization) == (COMMIT, "imagenet")


def test_weights_in_pytorch_s_cache_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert cached_weights("mobilenet_v2", tmp_path / "weights") == file


def test_what_cannot_be_fetched_names_the_cure(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no ImageNet weights are published"):
        fetch_encoder("tu-no_such", tmp_path)
    with pytest.raises(UserError, match="--offline forbids the download"):
        fetch_encoder("resnet18", tmp_path, offline=True)
    hub_file(monkeypatch, tmp_path / "hub", "resnet18").write_bytes(b"<html>")
    with pytest.raises(UserError, match="expected a safetensors file, got a web page"):
        fetch_encoder("resnet18", tmp_path / "weights", offline=True)
    assert not encoder_path(tmp_path / "weights", "resnet18").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x" * 200, "a\n"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="expected the name of an encoder"):
        encoder_path(tmp_path, name)
    assert encoder_name(f"encoder-{name}.safetensors") == ""


def test_records_of_any_origin_are_checked():
    good = {"sha256": SHA256, "source": "https://x", "revision": "r", "normalization": None}
    assert EncoderRecord.of(good) == EncoderRecord(**good)
    for change in ({"sha256": "x"}, {"sha256": 1}, {"source": "a\x1b"}, {"normalization": "no"}, {"normalization": []}):
        assert EncoderRecord.of(json.loads(json.dumps(good | change))) is None
    assert EncoderRecord.of([]) is EncoderRecord.of("x") is EncoderRecord.of({}) is None
