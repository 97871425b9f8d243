"""Inference: frames, flips, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kmine.data.resize import to_frame
from kmine.training.inference import image_tensor, infer, predict_resized

CPU = torch.device("cpu")


class Pixelwise(nn.Module):
    """Foreground logit from the red channel, probability one half at 127.5; equivariant to flips."""

    def forward(self, x: Tensor) -> Tensor:
        red = (x[:, :1].float() - 127.5) / 20
        return torch.cat([-red, red], dim=1)


class LeftOnly(Pixelwise):
    """Predicts foreground in the left half only, so that the effect of flips is known."""

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

    def in_frame(self, planes: np.ndarray, sample_id: str) -> np.ndarray:
        return to_frame(planes, *self.shape)


def picture(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_an_image_tensor_has_its_channels_first():
    image = picture(0)
    assert torch.equal(image_tensor(image[None], CPU)[0, 2], torch.from_numpy(image[..., 2]))


@pytest.mark.parametrize("tta", ["none", "hflip", "flips"])
def test_flips_have_no_effect_on_an_equivariant_network(tta):
    probs, std = predict_resized(Pixelwise(), picture(0)[None], tta, CPU)
    plain, _ = predict_resized(Pixelwise(), picture(0)[None], "none", CPU)
    assert np.allclose(probs, plain, atol=1e-6) and std.max() < 1e-6
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-6)


def test_flips_are_averaged_and_their_deviation_is_returned():
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    probs, std = predict_resized(LeftOnly(), white, "hflip", CPU)
    assert np.allclose(probs[0, 1], 0.5, atol=1e-3), "each half is foreground in one of the two views"
    assert np.allclose(std, 0.5, atol=1e-3)


def test_order_and_frames_do_not_depend_on_the_batch_size():
    images = {str(n): picture(n) for n in range(5)}
    pool = FakePool(images, (20, 30))
    batched = list(infer(Pixelwise(), pool, list(images), batch_size=3, tta="flips", device=CPU))
    assert [p.sample_id for p in batched] == list(images)
    for p in batched:
        assert p.probs.shape == (2, 20, 30) and p.tta_std.shape == (20, 30) and p.mask.dtype == np.uint8
        assert np.allclose(p.probs.sum(axis=0), 1, atol=1e-5)
    single = next(iter(infer(Pixelwise(), pool, ["3"], batch_size=1, tta="flips", device=CPU)))
    assert np.allclose(single.probs, batched[3].probs, atol=1e-6)
    assert next(infer(Pixelwise(), pool, ["3"], batch_size=1, tta="none", device=CPU)).tta_std is None


def test_rows_stay_rows_in_the_native_frame():
    plane = np.zeros((1, 4, 4), np.float32)
    plane[0, 0] = 1  # the top row
    grown = to_frame(plane, 8, 20)[0]
    assert grown.shape == (8, 20) and grown[0].min() == 1 and grown[4:].max() == 0


def test_nan_logits_are_an_error():
    class Broken(Pixelwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(FloatingPointError, match="NaN"):
        predict_resized(Broken(), picture(0)[None], "none", CPU)
