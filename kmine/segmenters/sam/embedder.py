"""SAM's image encoder with preprocessing, batching that adapts to GPU memory, and a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.utils.transforms import ResizeLongestSide

from kmine.segmenters.cached_encoder import CachedEncoder
from kmine.segmenters.sam.build import Feed, feed_of
from kmine.segmenters.sam.fast_encoder import VERSION, use_fused_attention
from kmine.segmenters.weights import update_digest


class Embedder(CachedEncoder):
    """Images to features, with fused attention (`fast_encoder.py`), on the device of `sam`.

    Segmenters that differ only in their mask decoder share one.

    Args:
        sam: its encoder's weights must not change any more.
        feed: how the images are given to it; None: as to SAM.
        encoding: settings of `CachedEncoder`.
    """

    def __init__(self, sam: Sam, feed: Feed | None = None, **encoding: Any) -> None:
        super().__init__(**encoding)
        if isinstance(sam.image_encoder, ImageEncoderViT):
            use_fused_attention(sam.image_encoder)
        self._sam = sam
        self._feed = feed or feed_of("", sam.image_encoder.img_size)
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)

    @cached_property
    def signature(self) -> str:
        """sha256 over everything but the image that determines features; not over prompt encoder and mask decoder."""
        config = (VERSION, self._sam.image_encoder.img_size, str(self._dtype))
        pixels = [values.flatten().tolist() for values in (self._sam.pixel_mean, self._sam.pixel_std)]
        digest = hashlib.sha256(f"sam encoder {config} {pixels}{self._feed.version}".encode())
        update_digest(digest, self._sam.image_encoder.state_dict())
        return digest.hexdigest()

    def forward(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(B, 256, E/16, E/16) features."""
        return self._sam.image_encoder(torch.stack([self._pixels(image) for image in images]))

    def _pixels(self, image: NDArray[np.uint8]) -> torch.Tensor:
        """(3, E, E) float32; for SAM resized by PIL as in the official predictor, normalised, padded with zeros."""
        if self._feed.pixels is not None:
            return torch.from_numpy(self._feed.pixels(image, self._feed.frame)).to(self._sam.device)
        resized = torch.from_numpy(self._resize.apply_image(image)).permute(2, 0, 1)
        return self._sam.preprocess(resized.to(self._sam.device))
