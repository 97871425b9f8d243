"""Segment Anything as a `Segmenter`: batched prompts, masks equal to the official predictor's.

Legend: E the side of the padded square that the encoder takes (1024), S = E / 4 of logits; `frame.py` has the frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from kmine.segmenters.base import ADAPTED, Embedding, FineTuneDefaults, Proposals
from kmine.segmenters.batched import BatchedSegmenter
from kmine.segmenters.sam.build import Feed, feed_of
from kmine.segmenters.sam.decoder import PromptDecoder
from kmine.segmenters.sam.embedder import Embedder
from kmine.segmenters.sam.finetune import SamFineTuner
from kmine.segmenters.sam.proposals import propose
from kmine.segmenters.weights import update_digest


class SamSegmenter(BatchedSegmenter):
    """A `FineTunable` `AutomaticMaskGenerator`; fine-tuned copies have their own mask decoder and share the encoders.

    Args:
        sam: from `build_sam`, moved to `device`; its weights must not change any more.
        name: for tables.
        feed: how the model is fed; None: as SAM.
        device: a torch device.
        multimask: see `BatchedSegmenter`.
        encoding: settings of `CachedEncoder`.
    """

    # Published fine-tunings of SAM's decoder take rates from 1e-4 (MedSAM, Ma et al. 2024, with the encoder) down to
    # 1e-5; few steps need the upper end. 200 steps of 4 take 3 minutes on one CPU core at 1024 px.
    fine_tune_defaults: FineTuneDefaults = FineTuneDefaults(steps=200, batch_size=4, lr=1e-4)

    def __init__(
        self,
        sam: Sam,
        *,
        name: str,
        feed: Feed | None = None,
        device: str = "cpu",
        multimask: bool | None = None,
        **encoding: Any,
    ) -> None:
        self._sam = sam.to(device).eval()
        self._feed = feed or feed_of("", sam.image_encoder.img_size)
        super().__init__(name, Embedder(self._sam, feed, **encoding), PromptDecoder(self._sam, name, feed), multimask)

    @cached_property
    def signature(self) -> str:
        """sha256 over every parameter and buffer and the image size; the same for the same weights in another file."""
        digest = hashlib.sha256(f"sam {self._sam.image_encoder.img_size}{self._feed.version}".encode())
        update_digest(digest, self._sam.state_dict())
        return digest.hexdigest()

    @torch.inference_mode()
    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """See `AutomaticMaskGenerator.propose`; the masks of SAM's own generator."""
        for embedding in embeddings:
            batch_size = self._queries_at_once(embedding.size, 3)
            yield propose(self._sam, self.decoder.features(embedding), embedding.size, points_at_once=batch_size)

    def fine_tuner(self) -> SamFineTuner:
        """A trainable copy of the mask decoder."""
        return SamFineTuner(self.decoder.copy())

    def with_weights(self, state: Mapping[str, Tensor]) -> SamSegmenter:
        """See `FineTunable.with_weights`; everything but the mask decoder is shared."""
        decoder = self.decoder.copy()
        decoder.load_state(state)
        name = self.name.removesuffix(ADAPTED) + ADAPTED
        settings = {"device": str(self._sam.device), "multimask": self._multimask, "feed": self._feed}
        segmenter = SamSegmenter(decoder.sam, name=name, **settings)
        segmenter._embedder = self._embedder  # one encoder, one cache
        return segmenter
