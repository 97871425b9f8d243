"""Checkpoints of every kind, and the official ones' download; tests/io/test_download.py breaks it off."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
import torch
from helpers.local_server import serving
from helpers.segmenter_suite import SMALL, random_sam
from safetensors.torch import save_file

from kmine.errors import UserError
from kmine.segmenters import weights
from kmine.segmenters.sam.build import ARCHITECTURES, build_sam
from kmine.segmenters.sam.segmenter import SamSegmenter

CONTENT = np.random.default_rng(0).bytes(700_000)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "sam_small", SMALL)
    return random_sam()


def signature(sam) -> str:
    return SamSegmenter(sam, name="s").signature


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "distributed", "safetensors"])
def test_round_trip(small, tmp_path, wrap) -> None:
    state, path = small.state_dict(), tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif wrap == "plain":
        torch.save(state, path)
    elif wrap == "distributed":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save({wrap: state, "epoch": 3}, path)
    assert signature(build_sam("sam_small", path, 256)) == signature(small)


@pytest.mark.slow
def test_round_trip_at_true_size(tmp_path) -> None:
    sam = random_sam("sam_vit_b", image_size=1024)
    save_file(sam.state_dict(), tmp_path / "medsam.safetensors")
    assert signature(build_sam("sam_vit_b", tmp_path / "medsam.safetensors")) == signature(sam)


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (1024, "looks like sam_vit_l: use --segmenter.name sam_vit_l"),
        (1280, "looks like sam_vit_h: use --segmenter.name sam_vit_h"),
        (192, "no SAM known here"),
    ],
)
def test_another_architecture_is_recognised(small, tmp_path, width, words) -> None:
    save_file({"image_encoder.patch_embed.proj.weight": torch.zeros(width, 3, 16, 16)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=words):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


def test_another_image_size_is_recognised(small, tmp_path) -> None:
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="made for images of 256 px, sam_small expects 512"):
        build_sam("sam_small", tmp_path / "w.safetensors", 512)


def test_a_part_of_sam_is_refused(small, tmp_path) -> None:
    state = {key: value for key, value in small.state_dict().items() if not key.startswith("mask_decoder")}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"Missing key.*mask_decoder"):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


def test_another_model_is_refused(small, tmp_path) -> None:
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"encoder.weight.*not a SAM image encoder"):
        build_sam("sam_small", tmp_path / "w.safetensors", 256)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 200_000])
def test_a_damaged_file_is_an_error_in_one_line(small, tmp_path, suffix, keep) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(small.state_dict(), path)
    else:
        save_file(small.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"damaged or not a checkpoint.*again") as caught:
        build_sam("sam_small", path, 256)
    assert "\n" not in str(caught.value)


def test_objects_beside_tensors_are_not_opened(tmp_path) -> None:
    torch.save({"model": {}, "args": threading.Event}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="Python objects"):
        weights.read_checkpoint(tmp_path / "w.pth")


def test_a_file_without_a_state_dict_is_refused(tmp_path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"expected a state dict.*epoch"):
        weights.read_checkpoint(tmp_path / "w.pth")


@pytest.fixture
def server(monkeypatch):
    with serving(CONTENT, monkeypatch) as running:
        known = weights.Weights(running.url("weights.pth"), hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setitem(weights.OFFICIAL_WEIGHTS, "sam_vit_b", known)
        yield running


def test_a_download_arrives_whole_and_once(server, tmp_path) -> None:
    path = weights.download_weights("sam_vit_b", tmp_path / "new", offline=False)
    assert path.read_bytes() == CONTENT
    assert weights.download_weights("sam_vit_b", tmp_path / "new", offline=True) == path
    assert [file.name for file in path.parent.iterdir()] == ["weights.pth"]
    assert len(server.ranges) == 1


def test_a_broken_download_goes_on_in_a_later_run(server, tmp_path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:123_456])
    server.breaks = [300_000]
    assert weights.download_weights("sam_vit_b", tmp_path, offline=False).read_bytes() == CONTENT
    assert server.starts[0] == 123_456 < server.starts[1]


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_names_the_flag(server, tmp_path, status) -> None:
    server.statuses = [status]
    with pytest.raises(UserError, match=rf"{status}.*--segmenter.checkpoint FILE"):
        weights.download_weights("sam_vit_b", tmp_path, offline=False)


def test_wrong_content_is_discarded(server, tmp_path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"expected SHA-256 .* got .*--segmenter.checkpoint FILE"):
        weights.download_weights("sam_vit_b", tmp_path, offline=False)
    assert list(tmp_path.iterdir()) == []
    assert weights.download_weights("sam_vit_b", tmp_path, offline=False).read_bytes() == CONTENT


def test_a_wrong_file_in_the_cache_is_named(server, tmp_path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="delete it"):
        weights.download_weights("sam_vit_b", tmp_path, offline=True)


def test_offline_asks_nobody(server, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--offline.*put http.*--segmenter.checkpoint FILE"):
        weights.download_weights("sam_vit_b", tmp_path, offline=True)
    assert server.ranges == []
