"""Files of weights: round trip, damage, and the shipped ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import box_prompts, images, random_net
from safetensors.torch import save_file

from kmine.config import SegmenterConfig
from kmine.errors import UserError
from kmine.ops.masks import tight_box
from kmine.segmenters import open_segmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny import SHIPPED
from kmine.segmenters.tiny import weights as tiny_weights
from kmine.segmenters.tiny.network import TinyNet
from kmine.segmenters.tiny.segmenter import Tiny, open_tiny
from kmine.segmenters.tiny.weights import load_tiny, save_tiny, signature_of


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_tiny(random_net(), path, {"script": "by hand", "seed": 3})
    return path


def test_a_round_trip_keeps_weights_in_half_precision(saved) -> None:
    segmenter = open_tiny(saved)
    assert segmenter.name == "tiny"
    assert segmenter.signature == signature_of(load_tiny(saved)) != signature_of(random_net(1))
    assert saved.stat().st_size < 12e6
    notes = json.loads(saved.with_suffix(".json").read_text())
    assert (notes["seed"], len(notes["sha256"])) == (3, 64)
    (candidate,) = segmenter.decode(segmenter.encode(images()[:1]), [box_prompts((3, 4, 20, 25))])[0]
    exact = Tiny(random_net())
    (same,) = exact.decode(exact.encode(images()[:1]), [box_prompts((3, 4, 20, 25))])[0]
    np.testing.assert_allclose(candidate.low_res_logits, same.low_res_logits, atol=0.05)  # half precision on disk


def test_damaged_weights_are_refused(saved, tmp_path) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(UserError, match="expected SHA-256"):
        load_tiny(saved)
    saved.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="`sha256` to be text"):
        load_tiny(saved)
    saved.with_suffix(".json").unlink()
    load_tiny(saved)  # an own file without a JSON file
    saved.write_bytes(content[:1000])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_tiny(saved)
    with pytest.raises(UserError, match="no such file"):
        load_tiny(tmp_path / "none.safetensors")


def test_weights_of_another_model_are_refused(tmp_path) -> None:

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not weights of `tiny`"):
        load_tiny(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"widths": "8 16", "side": "32"})
    with pytest.raises(UserError, match="not weights of `tiny`"):
        load_tiny(path)
    broken = random_net()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    save_tiny(broken, path, {})
    with pytest.raises(UserError, match="not finite"):
        load_tiny(path)


def test_weights_that_a_trainer_wrapped_are_read(tmp_path) -> None:
    net = TinyNet((8, 16))
    torch.save({"model_state": {f"net.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pt")
    assert signature_of(load_tiny(tmp_path / "w.pt")) == signature_of(net)


def test_the_shipped_weights_are_small_whole_and_need_no_network(monkeypatch) -> None:
    monkeypatch.setattr("socket.socket", None)
    shipped = open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=False)
    assert shipped.name == "tiny"
    assert shipped.signature == signature_of(load_tiny(SHIPPED)) != Tiny(random_net()).signature
    assert SHIPPED.stat().st_size <= 12e6
    notes = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert {"script", "commit", "seed", "step", "pool_seed", "sha256"} <= notes.keys()


def test_the_shipped_weights_beat_the_ellipse() -> None:
    # An ellipse 64 long and 22 wide, tilted by 45 degrees: it fills little of its box.
    rows, columns = np.mgrid[:80, :100]
    truth = ((columns + rows - 90) / 32) ** 2 + ((columns - rows - 10) / 11) ** 2 <= 2
    noise = np.random.default_rng(0).integers(-15, 16, (80, 100, 3))
    picture = (np.where(truth, 160, 70)[..., None] + noise).astype(np.uint8)
    (box,) = box_prompts(tight_box(truth))
    ious = []
    for segmenter in (Ellipse(), open_tiny(SHIPPED)):
        mask = segmenter.decode(segmenter.encode([picture]), [[box]])[0][0].masks[0]
        ious.append(np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth))
    assert ious[0] < 0.5
    assert ious[1] > 0.8


def test_a_damaged_installation_is_named(saved, monkeypatch) -> None:
    monkeypatch.setattr(tiny_weights, "SHIPPED", saved)
    monkeypatch.setattr("kmine.segmenters.tiny.SHIPPED", saved)

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=f"{words}.*; it is part of kmine: reinstall kmine$") as caught:
            open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=True)
        assert "--segmenter.checkpoint" not in str(caught.value)

    notes, content = saved.with_suffix(".json"), bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    refused("expected SHA-256 [0-9a-f]{64} from tiny.json, got [0-9a-f]{64}")
    text = notes.read_text()
    notes.write_text("{")
    refused("as JSON, got something else")
    notes.unlink()
    refused("tiny.json: no such file, so tiny.safetensors cannot be checked")
    notes.write_text(text)
    saved.unlink()
    refused("tiny.safetensors: no such file")
