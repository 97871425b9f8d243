"""Image encoders with batches that adapt to GPU memory, and a cache of their features."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.segmenters.embedding_cache import EmbeddingCache, KeyIndex, KnownImage


class CachedEncoder(ABC):
    """Images to features; a subclass gives `signature` and `forward`.

    Args:
        batch_size: images per forward pass; halved, once and for all, where a GPU's memory is too small.
        cache: of features; None encodes every time.
        dtype: float32 or float16, to which features are rounded, so that results do not depend on what is cached.
        log: gets a line when a batch is too large for the GPU.
    """

    signature: str
    """sha256 over everything but the image that determines features."""

    def __init__(
        self,
        *,
        batch_size: int = 4,
        cache: EmbeddingCache | None = None,
        dtype: str = "float32",
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.batch_size = batch_size
        self._cache = cache
        self._dtype = np.dtype(dtype)
        self._log = log
        self._indices: dict[str, KeyIndex] = {}

    @abstractmethod
    def forward(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(B, C, h, w) features of images (H, W, 3) uint8 RGB of any sizes."""

    @torch.inference_mode()
    def features(self, images: Sequence[NDArray[np.uint8] | KnownImage]) -> list[NDArray[np.float32]]:
        """(C, h, w) float32 of each (H, W, 3) uint8 RGB image, rounded to `dtype`.

        A `KnownImage` is decoded only if it is encoded, or its key is not known.

        Raises:
            UserError: the GPU's memory is too small for one image.
        """
        cache = self._cache
        keys = [self._key(image) for image in images] if cache else []
        results = [cache.get(key) for key in keys] if cache else [None] * len(images)
        missing = [n for n, features in enumerate(results) if features is None]
        done = 0
        while done < len(missing):
            batch = missing[done : done + self.batch_size]
            made = self._encode([_pixels_of(images[n]) for n in batch])
            if made is None:
                self._halve(len(batch))
                continue
            for n, features in zip(batch, made, strict=True):
                results[n] = features
                if cache:  # after every batch: an interruption loses one at most
                    cache.put(keys[n], features)
            done += len(batch)
        return [features.astype(np.float32, copy=False) for features in results]

    def stored(self, images: Sequence[KnownImage]) -> list[NDArray[np.floating] | None]:
        """Features on disk in their own precision, None for others; no image is decoded."""
        if self._cache is None:
            return [None] * len(images)
        keys = [self._index(image).get(image.sample_id) for image in images]
        return [key and self._cache.get(key) for key in keys]

    def reserve(self, images: Sequence[KnownImage]) -> str:
        """See `kmine.segmenters.embedding_cache.CachingSegmenter.reserve`."""
        if self._cache is None:
            return "embeddings are not kept (segmenter.cache_gb 0): images are encoded again in each round"
        keys = (self._index(image).get(image.sample_id) for image in images)
        present, budget = self._cache.reserve(key for key in keys if key), self._cache.budget
        text = f"embeddings: {len(present)} of {len(images)} images are in {self._cache.folder}"
        needed = len(images) * present[0] if present else 0
        if needed <= budget:
            return f"{text}, which may hold {budget / 1e9:.1f} GB" + f"; all take {needed / 1e9:.1f} GB" * bool(needed)
        more = f"unless --segmenter.cache_gb {needed / 1e9:.0f} allows more"
        return f"{text}, which may hold {budget // present[0]:,}; the others are encoded again in each round, {more}"

    def _index(self, image: KnownImage) -> KeyIndex:
        group = image.data_fingerprint
        if group not in self._indices:
            name = hashlib.sha256(f"{self.signature} {group}".encode()).hexdigest()
            self._indices[group] = KeyIndex(self._cache.folder / "keys" / f"{name}.jsonl")
        return self._indices[group]

    def _key(self, image: NDArray[np.uint8] | KnownImage) -> str:
        if not isinstance(image, np.ndarray):
            index = self._index(image)
            key = index.get(image.sample_id)
            if key is None:
                index.add(image.sample_id, key := self._key(image.image))
            return key
        digest = hashlib.sha256(f"{self.signature} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def _encode(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.floating]] | None:
        """Features of one batch; None where the GPU's memory is too small for it."""
        try:
            out = self.forward(images).float().cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            return None
        # Copies: a view would keep the whole batch alive.
        return [np.array(row, self._dtype) for row in out]

    def _halve(self, too_many: int) -> None:
        # Outside of `except`: the exception references the tensors that fill the memory.
        torch.cuda.empty_cache()
        if too_many == 1:
            raise UserError(
                "segmenter: expected GPU memory for at least one image, got less; stop other programs on the GPU, "
                "choose a smaller SAM, or use --device cpu"
            )
        self.batch_size = too_many // 2
        self._log(
            f"segmenter: {too_many} images at once exceed the GPU's memory; continuing with {self.batch_size} "
            "(--segmenter.batch_size)"
        )


def _pixels_of(image: NDArray[np.uint8] | KnownImage) -> NDArray[np.uint8]:
    return image if isinstance(image, np.ndarray) else image.image
