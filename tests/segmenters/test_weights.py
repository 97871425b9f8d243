"""Checkpoints of every format, and downloads of the official ones; tests/io/test_download.py interrupts them."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
import torch
from helpers.local_server import serving
from safetensors.torch import save_file

from kmine.errors import UserError
from kmine.segmenters import weights

CONTENT = np.random.default_rng(0).bytes(700_000)


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "distributed", "safetensors"])
def test_every_format_gives_the_state_dict(tmp_path, wrap) -> None:
    state, path = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(1)}, tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif wrap == "plain":
        torch.save(state, path)
    elif wrap == "distributed":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save({wrap: state, "epoch": 3}, path)
    read = weights.read_checkpoint(path)
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


def test_a_digest_covers_names_dtypes_shapes_and_values() -> None:
    def digest(**state: torch.Tensor) -> str:
        sha256 = hashlib.sha256()
        weights.update_digest(sha256, state)
        return sha256.hexdigest()

    two = torch.tensor([1.0, 2.0])
    changed = [{"b": two}, {"a": two.double()}, {"a": two[None]}, {"a": two + 1}, {"a": two, "b": two}]
    assert len({digest(**state) for state in ({"a": two}, *changed)}) == 6
    assert digest(a=two, b=-two) == digest(b=-two, a=two)


def test_adapted_tensors_that_do_not_fit_are_refused_in_one_line() -> None:
    module, other = torch.nn.Linear(2, 1), torch.nn.Linear(3, 1)
    fitting = {key: value + 1 for key, value in module.state_dict().items()}
    weights.load_adapted(module, fitting, "a head")
    assert all(torch.equal(value, fitting[key]) for key, value in module.state_dict().items())
    with pytest.raises(ValueError, match=r"^expected a head, got tensors that do not fit: .*weight.*; adapt") as raised:
        weights.load_adapted(module, other.state_dict(), "a head")
    assert "\n" not in str(raised.value)
    assert weights.one_line(RuntimeError("a\n\tb " + 400 * "c")) == "a b " + 396 * "c"


def test_a_file_with_python_objects_is_refused(tmp_path) -> None:
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


def test_a_download_is_complete_and_happens_once(server, tmp_path) -> None:
    path = weights.download_weights("sam_vit_b", tmp_path / "new", offline=False)
    assert path.read_bytes() == CONTENT
    assert weights.download_weights("sam_vit_b", tmp_path / "new", offline=True) == path
    assert [file.name for file in path.parent.iterdir()] == ["weights.pth"]
    assert len(server.ranges) == 1


def test_an_interrupted_download_continues(server, tmp_path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:123_456])
    server.breaks = [300_000]
    assert weights.download_weights("sam_vit_b", tmp_path, offline=False).read_bytes() == CONTENT
    assert server.starts[0] == 123_456 < server.starts[1]


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_error_names_the_flag(server, tmp_path, status) -> None:
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


def test_offline_no_request_is_made(server, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--offline.*put http.*--segmenter.checkpoint FILE"):
        weights.download_weights("sam_vit_b", tmp_path, offline=True)
    assert server.ranges == []
