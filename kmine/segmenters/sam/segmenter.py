"""Segment Anything as a `Segmenter`: batched prompts, masks equal to the official predictor's.

Legend: E the side of the padded square that the encoder takes (1024), S = E / 4 of logits; `decoder.py` has the frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor

from kmine.segmenters import base
from kmine.segmenters.base import ADAPTED, Embedding, FineTuneDefaults, Proposals
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.sam.decoder import DecoderQuery, PromptDecoder
from kmine.segmenters.sam.embedder import Embedder
from kmine.segmenters.sam.finetune import SamFineTuner
from kmine.segmenters.sam.proposals import propose
from kmine.segmenters.weights import update_digest
from kmine.types import Candidate, Prompts

MAX_LOGITS = 2**27
"""Floats of upscaled logits held at once (0.5 GB): bounds the prompts of a decoder batch."""
MAX_QUERIES = 64
"""Most prompts in one decoder batch."""
CPU_FLOATS = 2**23
"""On a CPU, the decoder's widest tensor stays below this (32 MB), which the C library reuses for the next one. Larger
ones come from the kernel page by page: twelve prompts at a time took 28 % longer than three at 1024 px."""


class SamSegmenter:
    """A `FineTunable` `AutomaticMaskGenerator`; fine-tuned copies have their own mask decoder and share the encoders.

    Args:
        sam: from `build_sam`, moved to `device`; its weights must not change any more.
        name: for tables.
        device: a torch device.
        multimask: three masks per prompt (True) or one (False). None: three for a single point, which may mean a part
            as well as the whole, and one for a box, a mask input or several points.
        batch_size, cache, dtype, log: of the image encoder, see `Embedder`.
    """

    # Published fine-tunings of SAM's decoder take rates from 1e-4 (MedSAM, Ma et al. 2024, with the encoder) down to
    # 1e-5; few steps need the upper end. 200 steps of 4 take 3 minutes on one CPU core at 1024 px.
    fine_tune_defaults: FineTuneDefaults = FineTuneDefaults(steps=200, batch_size=4, lr=1e-4)

    def __init__(
        self,
        sam: Sam,
        *,
        name: str,
        device: str = "cpu",
        batch_size: int = 4,
        multimask: bool | None = None,
        cache: EmbeddingCache | None = None,
        dtype: str = "float32",
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = name
        self._sam = sam.to(device).eval()
        self.decoder = PromptDecoder(self._sam, name)
        self._embedder = Embedder(self._sam, batch_size=batch_size, cache=cache, dtype=dtype, log=log)
        self._multimask = multimask

    @cached_property
    def signature(self) -> str:
        """sha256 over every parameter and buffer and the image size; the same for the same weights in another file."""
        digest = hashlib.sha256(f"sam {self._sam.image_encoder.img_size}".encode())
        update_digest(digest, self._sam.state_dict())
        return digest.hexdigest()

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """See `Segmenter.encode`; features are (256, E/16, E/16) float32, read from the cache or encoded in batches.

        Raises:
            UserError: the GPU's memory is too small for one image.
        """
        base.check_images(images)
        features = self._embedder.features(images)
        return [Embedding((image.shape[0], image.shape[1]), f) for image, f in zip(images, features, strict=True)]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """See `Segmenter.decode`; prompts of one form share a decoder batch, jittered boxes included.

        `low_res_logits` are (M, S, S) in the padded frame, `predicted_iou` is SAM's, clipped to [0, 1]. Masks and
        `stability_score` are of the logits upscaled to (H, W), as in `Sam.postprocess_masks` and SAM's own generator.
        """
        base.check_pairs(embeddings, prompts)
        return [self._decode_image(*pair) for pair in zip(embeddings, prompts, strict=True)]

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
        segmenter = SamSegmenter(decoder.sam, name=name, device=str(self._sam.device), multimask=self._multimask)
        segmenter._embedder = self._embedder  # one encoder, one cache
        return segmenter

    def _decode_image(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidate]:
        size = embedding.size
        queries = [query for owner, prompt in enumerate(prompts) for query in self.decoder.queries(owner, prompt, size)]
        rows: list[tuple[int, Candidate]] = []
        features = self.decoder.features(embedding) if queries else None
        for form in dict.fromkeys(query.form for query in queries):
            same_form = [query for query in queries if query.form == form]
            multimask = self._multimask if self._multimask is not None else form == (False, 1, False)
            step = self._queries_at_once(size, 3 if multimask else 1)
            for start in range(0, len(same_form), step):
                batch = same_form[start : start + step]
                decoded = self._decode_batch(features, size, batch, multimask)
                rows += zip((query.owner for query in batch), decoded, strict=True)
        return [base.candidate_of([row for owner, row in rows if owner == n]) for n in range(len(prompts))]

    def _queries_at_once(self, size: tuple[int, int], num_masks: int) -> int:
        """Largest decoder batch within `MAX_QUERIES`, `MAX_LOGITS` and, on a CPU, `CPU_FLOATS`."""
        square = self._sam.image_encoder.img_size**2
        count = min(MAX_QUERIES, MAX_LOGITS // (max(size[0] * size[1], square) * num_masks))
        if self._sam.device.type == "cpu":
            # 32 channels at a quarter of E: 2 E^2 floats a row.
            count = min(count, (CPU_FLOATS - 1) // (2 * square))
        return max(1, count)

    def _decode_batch(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> list[Candidate]:
        """One candidate per query; its predicted IoU is not clipped, and a jittered box has no stability."""
        low_res, iou = self.decoder.low_res(features, size, queries, multimask)
        base.check_logits(bool(torch.isfinite(low_res).all() and torch.isfinite(iou).all()), self.name)
        logits, threshold = self.decoder.upscaled(low_res, size), self._sam.mask_threshold
        rows = []
        for query, logit, score, coarse in zip(queries, logits, iou, low_res, strict=True):
            masks = (logit > threshold).cpu().numpy()
            stability = np.full(len(masks), np.nan, np.float32)
            if not query.jittered:
                stability = base.stability_from_logits(logit.cpu().numpy(), threshold)
            logits_copy = coarse.cpu().numpy().copy()  # a view would keep the whole batch alive
            rows.append(Candidate(masks, score.cpu().numpy(), stability, logits_copy, jittered_masks=masks[:0]))
        return rows
