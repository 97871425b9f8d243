"""Inference: frames, flips, and what may not pass silently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kmine.training.inference import infer, predict_resized, to_frame

CPU = torch.device("cpu")


class Pixelwise(nn.Module):
    """Foreground logit: the red channel, 127.5 is even odds; equivariant to every flip."""

    def forward(self, x: Tensor) -> Tensor:
        red = (x[:, :1].float() - 127.5) / 20
        return torch.cat([-red, red], dim=1)


class LeftOnly(Pixelwise):
    """Sees the foreground in the left half only: what flips do to it is known."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        half = x.shape[-1] // 2
        out[:, 0, :, half:], out[:, 1, :, half:] = 10, -10
        return out


class FakePool:
    def __init__(self, images: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
        self.images, self.shape = images, shape

    def image_resized(self, sample_id: str) -> np.ndarray:
        return self.images[sample_id]

    def native_shape(self, sample_id: str) -> tuple[int, int]:
        return self.shape


def picture(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("tta", ["none", "hflip", "flips"])
def test_flips_change_nothing_for_a_network_that_is_blind_to_them(tta):
    probs, std = predict_resized(Pixelwise(), picture(0)[None], tta, CPU)
    plain, _ = predict_resized(Pixelwise(), picture(0)[None], "none", CPU)
    assert np.allclose(probs, plain, atol=1e-6) and std.max() < 1e-6
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-6)


def test_flips_are_averaged_and_their_deviation_is_known():
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    probs, std = predict_resized(LeftOnly(), white, "hflip", CPU)
    assert np.allclose(probs[0, 1], 0.5, atol=1e-3), "each half is seen by one of the two views"
    assert np.allclose(std, 0.5, atol=1e-3)


def test_order_frame_and_batches():
    images = {str(n): picture(n) for n in range(5)}
    pool = FakePool(images, (20, 30))
    together = list(infer(Pixelwise(), pool, list(images), batch_size=3, tta="flips", device=CPU))
    assert [p.sample_id for p in together] == list(images)
    for p in together:
        assert p.probs.shape == (2, 20, 30) and p.tta_std.shape == (20, 30) and p.mask.dtype == np.uint8
        assert np.allclose(p.probs.sum(axis=0), 1, atol=1e-5)
    alone = next(iter(infer(Pixelwise(), pool, ["3"], batch_size=1, tta="flips", device=CPU)))
    assert np.allclose(alone.probs, together[3].probs, atol=1e-6)
    assert next(infer(Pixelwise(), pool, ["3"], batch_size=1, tta="none", device=CPU)).tta_std is None


def test_rows_stay_rows_on_the_way_to_the_native_frame():
    plane = np.zeros((1, 4, 4), np.float32)
    plane[0, 0] = 1  # the top row
    grown = to_frame(plane, 8, 20)[0]
    assert grown.shape == (8, 20) and grown[0].min() == 1 and grown[4:].max() == 0


def test_nan_logits_are_not_taken_for_a_prediction():
    class Broken(Pixelwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(FloatingPointError, match="NaN"):
        predict_resized(Broken(), picture(0)[None], "none", CPU)
