"""Batches, cache and rounding of an encoder without a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmine.errors import UserError
from kmine.segmenters.cached_encoder import CachedEncoder
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.testing import noise_images


class Means(CachedEncoder):
    """The mean of an image as its features; out of memory above `limit` images."""

    signature, limit = "means", 9

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.batches: list[int] = []

    def forward(self, images):
        if len(images) > self.limit:
            raise torch.cuda.OutOfMemoryError
        self.batches.append(len(images))
        return torch.tensor([[[[image.mean()]]] for image in images])


def test_images_are_encoded_in_batches_and_read_back(tmp_path) -> None:
    cache, images = EmbeddingCache(tmp_path / "e", 10**8, print), noise_images()
    encoder = Means(batch_size=2, cache=cache, dtype="float16")
    first = encoder.features(images)
    assert encoder.batches == [2, 1] and [f.dtype for f in first] == [np.float32] * 3
    assert [float(f.item()) for f in first] == [float(np.float16(image.mean())) for image in images]
    again = Means(batch_size=2, cache=cache, dtype="float16")
    np.testing.assert_array_equal(again.features(images[::-1]), first[::-1])
    assert again.batches == []


def test_a_batch_is_halved_until_it_fits(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    said: list[str] = []
    encoder = Means(batch_size=3, log=said.append)
    encoder.limit = 1
    assert len(encoder.features(noise_images())) == 3 and encoder.batches == [1, 1, 1]
    assert encoder.batch_size == 1 and "continuing with 1" in said[0]
    encoder.limit = 0
    with pytest.raises(UserError, match="GPU memory for at least one image"):
        encoder.features(noise_images())
