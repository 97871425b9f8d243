"""Flips of an ONNX network: their mean, their spread, and refusals; no ONNX file is needed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kmine.errors import UserError
from kmine.predict import network as predict_network
from kmine.predict.network import BatchProbs, OnnxNetwork, TorchNetwork, _Cores, open_onnx

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)


def network(foreground) -> OnnxNetwork:
    """A network of two classes whose foreground is a function of the (B, S, S) red channel."""

    def run(_, inputs):
        red = foreground(inputs["images"][..., 0].astype(np.float32) / 255)
        return [np.stack([1 - red, red], axis=1)]

    made = object.__new__(OnnxNetwork)
    made.session, made._cores = SimpleNamespace(run=run), None
    return made


@pytest.mark.parametrize("tta", ["none", "hflip", "flips"])
def test_flips_change_nothing_for_a_network_that_acts_on_single_pixels(tta):
    found = network(lambda red: red).predict(IMAGES, tta)
    assert found.probs.dtype == np.float32
    assert np.allclose(found.probs[:, 1], IMAGES[..., 0] / 255)
    assert found.std is None if tta == "none" else (found.std.shape == (2, 1, 4, 4) and found.std.max() < 1e-6)


def test_the_mean_over_flips_is_symmetric_and_the_deviation_is_that_of_the_views():
    column = np.arange(4, dtype=np.float32) / 4
    found = network(lambda red: np.broadcast_to(column, red.shape)).predict(IMAGES, "hflip")
    assert np.allclose(found.probs[:, 1], 0.375)
    assert np.allclose(found.std[0, 0, 0], np.abs(column - column[::-1]) / 2)


@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_cores_give_what_one_thread_gives_in_the_order_of_the_images(tta, monkeypatch):
    monkeypatch.setattr(predict_network, "PART_PIXELS", 2 * 4 * 4)
    images = np.random.default_rng(1).integers(0, 256, (9, 4, 4, 3), np.uint8)
    one, sizes = network(lambda red: red * np.linspace(0, 1, 4, dtype=np.float32)), []

    def predict(part, tta):
        sizes.append(len(part))
        return one.predict(part, tta)

    cores, whole = _Cores(predict, 3), one.predict(images, tta)
    for _ in range(2):
        found = cores(images, tta)
        assert np.array_equal(found.probs, whole.probs)
        assert (found.std is None) if tta == "none" else np.array_equal(found.std, whole.std)
    assert sorted(sizes) == [1, 1, *[2] * 8]


def test_a_run_is_predicted_by_single_cores_and_leaves_the_number_of_threads(monkeypatch):
    class Model(nn.Module):
        def forward(self, images):
            threads.append(torch.get_num_threads())
            return torch.cat([images[:, :1] * 0.0, images[:, :1] / 99.0], dim=1)

    monkeypatch.setattr(predict_network, "PART_PIXELS", 1)
    threads, before = [], torch.get_num_threads()
    made = TorchNetwork(lambda: Model(), "cpu")
    try:
        torch.set_num_threads(2)
        several = made.predict(IMAGES, "hflip")
        assert torch.get_num_threads() == 2 and threads == [1] * 4  # two images, each as it is and mirrored
        alone = [made.predict(IMAGES[n : n + 1], "hflip") for n in range(2)]
        assert np.array_equal(several.probs, np.concatenate([of_one.probs for of_one in alone]))
    finally:
        torch.set_num_threads(before)


def test_probabilities_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        network(lambda red: red * np.nan).predict(IMAGES, "none")


def test_a_batch_is_split_into_images_with_or_without_deviation():
    probs = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    assert [std for _, std in BatchProbs(probs, None).per_image()] == [None, None]
    (first, std), _ = BatchProbs(probs, probs[:, :1]).per_image()
    assert np.array_equal(first, probs[0]) and np.array_equal(std, probs[0, :1])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.onnx: expected an exported model, found no such file"):
        open_onnx(tmp_path / "no.onnx", "cpu")
