"""`tiny`: a promptable segmenter small enough to ship. Each box is segmented in a crop of S x S around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kmine.segmenters import base
from kmine.segmenters.base import ADAPTED, Embedding, FineTuneDefaults, Proposals
from kmine.segmenters.tiny.crops import CropQuery, crop_queries, network_input
from kmine.segmenters.tiny.finetune import TinyFineTuner
from kmine.segmenters.tiny.network import TinyNet, ellipse_logits, planes_of
from kmine.segmenters.tiny.proposals import propose
from kmine.segmenters.tiny.weights import load_tiny, signature_of
from kmine.segmenters.weights import load_adapted
from kmine.types import Candidate, Prompts


class Tiny:
    """A `FineTunable` `AutomaticMaskGenerator`. A box is required; points and a mask input are optional.

    The crop is the box with `window.MARGIN` of its side around it: masks end there, and prompts outside have no effect.

    Args:
        net: moved to `device`; its weights must not change any more. Untrained it gives the inscribed ellipse.
        name: for tables.
        device: a torch device.
        batch_size: boxes per forward pass, jittered ones included.
    """

    fine_tune_defaults = FineTuneDefaults(steps=200, batch_size=16, lr=5e-4)
    """Learning rate: a quarter of pretraining's, to keep most of it."""

    def __init__(self, net: TinyNet, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> None:
        self.name = name
        self._net = net.to(device, memory_format=torch.channels_last).eval()
        self._device = device
        self._batch_size = batch_size

    @cached_property
    def signature(self) -> str:
        """sha256 over architecture and weights; the same for the same weights in another file."""
        return signature_of(self._net)

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """See `Segmenter.encode`; embeddings hold the image, since the network reads pixels for every box."""
        base.check_images(images)
        return [Embedding(size=(image.shape[0], image.shape[1]), image=image) for image in images]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """See `Segmenter.decode`; all boxes of all images, `batch_size` per forward pass, M = 1.

        `low_res_logits` are (1, S, S) in the crop's frame; masks are the same logits in the image's frame, at or above
        0, where `stability_score` is computed, too.
        """
        base.check_pairs(embeddings, prompts)
        queries = [
            query
            for embedding, of_image in zip(embeddings, prompts, strict=True)
            for prompt in of_image
            for query in crop_queries(embedding, prompt, side=self._net.side, name=self.name)
        ]
        rows: list[Candidate] = []
        for start in range(0, len(queries), self._batch_size):
            rows += self._predict_batch(queries[start : start + self._batch_size])
        left = iter(rows)
        counts = [[1 + len(prompt.jittered_boxes) for prompt in of_image] for of_image in prompts]
        return [[base.candidate_of(list(islice(left, count))) for count in of_image] for of_image in counts]

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """See `AutomaticMaskGenerator.propose`; masks of a grid of boxes without near-duplicates (`proposals.py`)."""
        return (propose(self, embedding) for embedding in embeddings)

    def fine_tuner(self) -> TinyFineTuner:
        """A trainable copy of the whole network, on the same device."""
        return TinyFineTuner(copy.deepcopy(self._net), name=self.name, device=self._device)

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> Tiny:
        """See `FineTunable.with_weights`; all weights are those of `state`."""
        net = copy.deepcopy(self._net)
        load_adapted(net, state, f"the tensors of `{self.name}` with widths {net.widths} and side {net.side}")
        name = self.name.removesuffix(ADAPTED) + ADAPTED
        return Tiny(net, name=name, device=self._device, batch_size=self._batch_size)

    def _predict_batch(self, queries: Sequence[CropQuery]) -> list[Candidate]:
        inputs = network_input(queries, self._device)
        planes = planes_of(inputs).contiguous(memory_format=torch.channels_last)
        added, score = self._net(planes)
        base.check_logits(bool(torch.isfinite(added).all() and torch.isfinite(score).all()), self.name)
        low_res = ellipse_logits(inputs.boxes, self._net.side, self._net.side) + added
        arrays = (tensor.cpu().numpy() for tensor in (added[:, 0], score, low_res[:, 0]))
        return [_in_image(query, *of_row) for query, *of_row in zip(queries, *arrays, strict=True)]


def open_tiny(path: Path, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> Tiny:
    """The segmenter with the weights of a file; `UserError` as in `load_tiny`."""
    return Tiny(load_tiny(path), name=name, device=device, batch_size=batch_size)


def _in_image(query: CropQuery, added: NDArray[np.float32], score: float, low_res: NDArray[np.float32]) -> Candidate:
    """A row's candidate; the ellipse is drawn at the image's resolution. A jittered box has no stability."""
    size = query.embedding.size
    rows, columns = query.window.visible(size)
    visible = query.window.paste(added, size)
    corner = [columns.start, rows.start] * 2
    # float64: rounding could put a border pixel of a large image on either side.
    box = torch.from_numpy(query.box.astype(np.float64) - corner)[None]
    logits = ellipse_logits(box, *visible.shape)[0, 0].numpy() + visible
    masks = np.zeros((1, *size), np.bool_)
    masks[0, rows, columns] = logits >= 0
    stability = np.full(1, np.nan, np.float32) if query.jittered else base.stability_from_logits(logits[None])
    return Candidate(masks, np.full(1, score, np.float32), stability, low_res[None].copy(), jittered_masks=masks[:0])
