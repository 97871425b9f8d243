"""Decoding of prompts in batches, shared by all networks of SAM's kind.

B prompts of one form are decoded at once, with M masks of each, on the features of one image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmine.segmenters import base
from kmine.segmenters.base import Abilities, Embedding
from kmine.segmenters.cached_encoder import CachedEncoder
from kmine.segmenters.embedding_cache import KnownImage
from kmine.segmenters.frame import SquareFrame
from kmine.types import Candidate, Prompts

MAX_LOGITS = 2**27
"""Floats of upscaled logits held at once (0.5 GB): bounds the prompts of a decoder batch."""
MAX_QUERIES = 64
"""Most prompts in one decoder batch."""
CPU_FLOATS = 2**23
"""On a CPU, the decoder's widest tensor stays below this (32 MB), which the C library reuses for the next one. Larger
ones come from the kernel page by page: twelve prompts at a time took 28 % longer than three at 1024 px."""


@dataclass(frozen=True)
class DecoderQuery:
    """One row of a decoder batch: a prompt's box or one of its jittered boxes, with its points and mask input."""

    owner: int
    """Index of its `Prompts` in the image's list."""
    jittered: bool
    box: NDArray[np.float32] | None
    prompts: Prompts
    mask_input: Tensor | None
    """(1, S, S) in the network's frame."""

    @property
    def form(self) -> tuple[bool, int, bool]:
        """(has a box, number of points, has a mask input), equal for all rows of a batch."""
        coords = self.prompts.point_coords
        return self.box is not None, 0 if coords is None else len(coords), self.mask_input is not None


class QueryDecoder(ABC):
    """A prompt encoder and a mask decoder behind a frame; a subclass gives `features` and `low_res`."""

    device: torch.device
    mask_threshold: float = 0.0

    def __init__(self, frame: SquareFrame, mask_side: int, abilities: Abilities) -> None:
        """`mask_side` is S, the side of mask inputs."""
        self.frame, self.abilities = frame, abilities
        self._mask_side = mask_side

    @abstractmethod
    def features(self, embedding: Embedding) -> Tensor:
        """(1, C, h, w) float32 on the device. `ValueError` for those of another model."""

    @abstractmethod
    def low_res(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """(B, M, S, S) logits in the network's frame and (B, M) predicted IoU, not clipped; queries are of one form."""

    def queries(self, owner: int, prompts: Prompts, size: tuple[int, int]) -> Iterator[DecoderQuery]:
        """Rows of a `Prompts` on an image of `size` = (H, W): its own, then its jittered boxes; see `check_prompts`."""
        checked = base.check_prompts(base.without_missing(prompts, self.abilities), size)
        mask_input = None if checked.mask_input is None else self.mask_input(checked.mask_input)
        for number, box in enumerate([checked.box, *checked.jittered_boxes]):
            yield DecoderQuery(owner, number > 0, box, checked, mask_input)

    def mask_input(self, logits: NDArray[np.float32]) -> Tensor:
        """(H, W) logits to (1, S, S) on the device: `SquareFrame.mask_input`."""
        return self.frame.mask_input(logits, self._mask_side).to(self.device)

    def unpadded(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of (S, S) logits that an image of `size` = (H, W) covers; the rest is padding."""
        return self.frame.covered(size, self._mask_side)

    def framed(
        self, queries: Sequence[DecoderQuery], size: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Queries of one form, on an image of `size`, in the network's frame; None for what the form lacks.

        Points (B, P, 2), labels (B, P) int32, boxes (B, 4), mask inputs (B, 1, S, S).
        """
        has_box, num_points, has_mask_input = queries[0].form
        points = labels = boxes = None
        if num_points:
            coords = np.stack([query.prompts.point_coords for query in queries])
            points = self._tensor(self.frame.points(coords, size), torch.float32)
            labels = self._tensor(np.stack([query.prompts.point_labels for query in queries]), torch.int32)
        if has_box:
            boxes = self._tensor(self.frame.boxes(np.stack([query.box for query in queries]), size), torch.float32)
        return points, labels, boxes, torch.stack([query.mask_input for query in queries]) if has_mask_input else None

    def upscaled(self, low_res: Tensor, size: Sequence[int]) -> Tensor:
        """(B, M, S, S) logits to (B, M, H, W) in the frame of an image of `size` = (H, W)."""
        return self.frame.upscaled(low_res, size)

    def _tensor(self, array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self.device)


class BatchedSegmenter:
    """A `Segmenter` of a `CachedEncoder` and a `QueryDecoder`; a subclass gives `signature`.

    Args:
        multimask: three masks per prompt (True) or one (False). None: three for a single point, which may mean a part
            as well as the whole, and one for a box, a mask input or several points.
    """

    def __init__(self, name: str, encoder: CachedEncoder, decoder: QueryDecoder, multimask: bool | None = None) -> None:
        self.name, self.abilities = name, decoder.abilities
        self.decoder = decoder
        self._embedder = encoder
        self._multimask = multimask

    def encode(self, images: Sequence[NDArray[np.uint8] | KnownImage]) -> list[Embedding]:
        """See `Segmenter.encode`; features are (C, h, w) float32, read from the cache or encoded in batches.

        Raises:
            UserError: the GPU's memory is too small for one image.
        """
        base.check_images([image for image in images if isinstance(image, np.ndarray)])
        sizes = [image.shape[:2] if isinstance(image, np.ndarray) else image.size for image in images]
        return list(map(Embedding, sizes, self._embedder.features(images)))

    def stored(self, images: Sequence[KnownImage]) -> list[Embedding | None]:
        """See `CachingSegmenter.stored`; features are as on disk, float16 or float32."""
        features = self._embedder.stored(images)
        return [None if f is None else Embedding(image.size, f) for image, f in zip(images, features, strict=True)]

    def reserve(self, images: Sequence[KnownImage]) -> str:
        """See `CachingSegmenter.reserve`."""
        return self._embedder.reserve(images)

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """See `Segmenter.decode`; prompts of one form share a decoder batch, jittered boxes included.

        `low_res_logits` are (M, S, S) in the network's frame, `predicted_iou` is the network's, clipped to [0, 1], NaN
        where it has none. Masks and `stability_score` are of the logits upscaled to (H, W), as in SAM's own generator.
        """
        base.check_pairs(embeddings, prompts)
        return [self._decode_image(*pair) for pair in zip(embeddings, prompts, strict=True)]

    def _decode_image(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidate]:
        size = embedding.size
        queries = [query for owner, prompt in enumerate(prompts) for query in self.decoder.queries(owner, prompt, size)]
        if any(query.box is None for query in queries) and not self.abilities.points:
            raise base.box_required_error(self.name)
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
        square = (4 * self.decoder.unpadded((1, 1))[0]) ** 2  # (4 S)^2, for SAM E^2
        count = min(MAX_QUERIES, MAX_LOGITS // (max(size[0] * size[1], square) * num_masks))
        if self.decoder.device.type == "cpu":
            # 32 channels of S^2: 2 (4 S)^2 floats a row.
            count = min(count, (CPU_FLOATS - 1) // (2 * square))
        return max(1, count)

    def _decode_batch(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> list[Candidate]:
        """One candidate per query; its predicted IoU is not clipped, and a jittered box has no stability."""
        low_res, iou = (out.float() for out in self.decoder.low_res(features, size, queries, multimask))
        base.check_logits(bool(torch.isfinite(low_res).all() and torch.isfinite(iou).all()), self.name)
        logits, threshold = self.decoder.upscaled(low_res, size), self.decoder.mask_threshold
        rows = []
        for query, logit, score, coarse in zip(queries, logits, iou, low_res, strict=True):
            masks = (logit > threshold).cpu().numpy()
            stability = np.full(len(masks), np.nan, np.float32)
            if not query.jittered:
                stability = base.stability_from_logits(logit.cpu().numpy(), threshold)
            logits_copy = coarse.cpu().numpy().copy()  # a view would keep the whole batch alive
            candidate = Candidate(masks, score.cpu().numpy(), stability, logits_copy, jittered_masks=masks[:0])
            if not self.abilities.predicted_iou:
                candidate = replace(candidate, predicted_iou=np.full(len(masks), np.nan, np.float32))
            rows.append(candidate)
        return rows
