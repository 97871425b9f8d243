"""Segment Anything as a `Segmenter`: batched prompts, masks equal to the official predictor's.

Legend: H, W the image's own frame; E the side of the padded square that the encoder takes (1024); S = E / 4 the side of
the decoder's logits (256); M masks of one prompt. `decoder.py` describes the frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor

from kmine.segmenters.base import (
    ADAPTED,
    Embedding,
    FineTuneDefaults,
    Proposals,
    check_images,
    check_logits,
    check_pairs,
    stability_from_logits,
)
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


@dataclass(frozen=True)
class _DecoderOutput:
    masks: NDArray[np.bool_]  # (M, H, W)
    predicted_iou: NDArray[np.float32]  # (M,), not clipped
    stability: NDArray[np.float32]  # (M,); NaN for a jittered box, whose stability is not used
    low_res: NDArray[np.float32]  # (M, S, S)


class SamSegmenter:
    """A `FineTunable` `AutomaticMaskGenerator` around one SAM, whose weights must not change any more.

    Fine-tuned copies have their own mask decoder and share the encoders.
    """

    # SAM's decoder, forward and backward, takes 0.2 s an example at 1024 px on one CPU core: 200 steps of 4 take
    # 3 minutes, less than the encoder takes for 10 images there. Rate: published fine-tunings of SAM's decoder take
    # from 1e-4 (MedSAM, Ma et al. 2024, with the encoder) down to 1e-5; few steps need the upper end.
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
        """Move a model to a device.

        Args:
            sam: from `build_sam`.
            name: for tables.
            device: a torch device.
            batch_size: images per forward pass of the encoder; halved, once and for all, where a GPU's memory is too
                small for it.
            multimask: three masks per prompt (True) or one (False). None: three for a single point, which may mean a
                part as well as the whole, and one for a box, a mask input or several points.
            cache: of embeddings; None encodes every time.
            dtype: float32 or float16, to which embeddings are rounded, cached or not.
            log: gets warnings, one line each.
        """
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
        """Embed (H, W, 3) uint8 RGB images of any sizes; cached embeddings are read, the others encoded in batches.

        Returns:
            Per image, features (256, E/16, E/16) float32 on the CPU.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
            UserError: the GPU's memory is too small for one image.
        """
        check_images(images)
        features = self._embedder.features(images)
        return [Embedding((image.shape[0], image.shape[1]), f) for image, f in zip(images, features, strict=True)]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Segment the prompts of each image; those of one form share a decoder batch, jittered boxes included.

        Masks are the logits upscaled to (H, W) as in `Sam.postprocess_masks`, above 0. `predicted_iou` is SAM's
        regression, clipped to [0, 1]. `stability_score` is computed on the upscaled logits, as in the official
        automatic mask generator. `low_res_logits` are (M, S, S) in the padded frame.

        Raises:
            ValueError: features of another model, or prompts that do not fit their image.
        """
        check_pairs(embeddings, prompts)
        return [
            self._decode_image(embedding, of_image) for embedding, of_image in zip(embeddings, prompts, strict=True)
        ]

    @torch.inference_mode()
    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """Masks of SAM's automatic mask generator on given embeddings, see `proposals.py`.

        Raises:
            ValueError: features of another model.
        """
        for embedding in embeddings:
            batch_size = self._queries_at_once(embedding.size, 3)
            yield propose(self._sam, self.decoder.features(embedding), embedding.size, points_at_once=batch_size)

    def fine_tuner(self) -> SamFineTuner:
        """A trainable copy of the mask decoder."""
        return SamFineTuner(self.decoder.copy())

    def with_weights(self, state: Mapping[str, Tensor]) -> SamSegmenter:
        """This segmenter with the mask decoder of a `SamFineTuner.state`; everything else is shared.

        Raises:
            ValueError: tensors of another architecture.
        """
        decoder = self.decoder.copy()
        decoder.load_state(state)
        segmenter = SamSegmenter(
            decoder.sam,
            name=self.name.removesuffix(ADAPTED) + ADAPTED,
            device=str(self._sam.device),
            multimask=self._multimask,
        )
        segmenter._embedder = self._embedder  # one encoder, one cache
        return segmenter

    def _decode_image(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidate]:
        size = embedding.size
        queries = [query for owner, prompt in enumerate(prompts) for query in self.decoder.queries(owner, prompt, size)]
        outputs: list[tuple[DecoderQuery, _DecoderOutput]] = []
        features = self.decoder.features(embedding) if queries else None
        for form in dict.fromkeys(query.form for query in queries):
            same_form = [query for query in queries if query.form == form]
            multimask = self._multimask if self._multimask is not None else form == (False, 1, False)
            step = self._queries_at_once(size, 3 if multimask else 1)
            for start in range(0, len(same_form), step):
                batch = same_form[start : start + step]
                outputs += zip(batch, self._decode_batch(features, size, batch, multimask), strict=True)
        return [_candidate([output for query, output in outputs if query.owner == n]) for n in range(len(prompts))]

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
    ) -> list[_DecoderOutput]:
        low_res, iou = self.decoder.low_res(features, size, queries, multimask)
        check_logits(bool(torch.isfinite(low_res).all() and torch.isfinite(iou).all()), self.name)
        logits, threshold = self.decoder.upscaled(low_res, size), self._sam.mask_threshold
        return [
            _DecoderOutput(
                masks=(logits[i] > threshold).cpu().numpy(),
                predicted_iou=iou[i].cpu().numpy(),
                stability=np.full(len(iou[i]), np.nan, np.float32)
                if query.jittered
                else stability_from_logits(logits[i].cpu().numpy(), threshold),
                low_res=low_res[i].cpu().numpy().copy(),
            )
            for i, query in enumerate(queries)
        ]


def _candidate(outputs: Sequence[_DecoderOutput]) -> Candidate:
    """The candidate of one `Prompts` from the outputs of its own row and then of its jittered boxes."""
    own, *rest = outputs
    best = [output.masks[int(output.predicted_iou.argmax())] for output in rest]
    return Candidate(
        masks=own.masks,
        predicted_iou=own.predicted_iou.clip(0, 1),
        stability_score=own.stability,
        low_res_logits=own.low_res,
        jittered_masks=np.stack(best) if best else np.zeros((0, *own.masks.shape[1:]), np.bool_),
    )
