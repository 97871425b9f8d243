"""`tiny`: a promptable segmenter small enough to ship. Each box is segmented in a crop around it.

Legend: H, W the image's own frame, S the side of the crop's frame (`window.py` converts), M = 1 mask per prompt.

A box is required; points and a mask input are optional. The crop is the box with `window.MARGIN` of its side around it:
masks end at the crop, and prompts outside it have no effect. Boxes over the image's border are clipped, see
`check_prompts`; a box as large as the image has no context.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

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
from kmine.segmenters.tiny.crops import CropQuery, crop_queries, network_input
from kmine.segmenters.tiny.finetune import TinyFineTuner
from kmine.segmenters.tiny.network import TinyNet, ellipse_logits, planes_of
from kmine.segmenters.tiny.proposals import propose
from kmine.segmenters.tiny.weights import load_tiny, signature_of
from kmine.types import Candidate, Prompts


@dataclass(frozen=True)
class _Output:
    mask: NDArray[np.bool_]  # (H, W)
    predicted_iou: float
    stability: float  # NaN for a jittered box, whose stability is not used
    low_res: NDArray[np.float32]  # (S, S)


class Tiny:
    """A `FineTunable` `AutomaticMaskGenerator` around a `TinyNet`, whose weights must not change any more."""

    fine_tune_defaults = FineTuneDefaults(steps=200, batch_size=16, lr=5e-4)
    """Learning rate: a quarter of pretraining's, to keep most of it."""

    def __init__(self, net: TinyNet, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> None:
        """Move a network to a device.

        Args:
            net: an untrained one gives the ellipse inscribed in the box.
            name: for tables.
            device: a torch device.
            batch_size: boxes per forward pass, jittered ones included.
        """
        self.name = name
        self._net = net.to(device, memory_format=torch.channels_last).eval()
        self._device = device
        self._batch_size = batch_size

    @cached_property
    def signature(self) -> str:
        """sha256 over architecture and weights; the same for the same weights in another file."""
        return signature_of(self._net)

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Keep (H, W, 3) uint8 RGB images of any sizes: the network reads pixels for every box.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
        """
        check_images(images)
        return [Embedding(size=(image.shape[0], image.shape[1]), image=image) for image in images]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Segment all boxes of all images, `batch_size` per forward pass; M = 1 in every candidate.

        `low_res_logits` are (1, S, S) in the crop's frame; masks are the same logits in the image's frame, at or above
        0. `stability_score` is computed in the image's frame.

        Raises:
            UserError: prompts without a box.
            ValueError: embeddings without an image, or prompts that do not fit their image.
        """
        check_pairs(embeddings, prompts)
        queries = [
            query
            for embedding, of_image in zip(embeddings, prompts, strict=True)
            for prompt in of_image
            for query in crop_queries(embedding, prompt, side=self._net.side, name=self.name)
        ]
        outputs: list[_Output] = []
        for start in range(0, len(queries), self._batch_size):
            outputs += self._predict_batch(queries[start : start + self._batch_size])
        remaining = iter(outputs)
        return [
            [_candidate([next(remaining) for _ in range(1 + len(prompt.jittered_boxes))]) for prompt in p]
            for p in prompts
        ]

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """Masks of a grid of boxes without near-duplicates, see `proposals.py`.

        Raises:
            ValueError: embeddings without an image.
        """
        return (propose(self, embedding) for embedding in embeddings)

    def fine_tuner(self) -> TinyFineTuner:
        """A trainable copy of the whole network, on the same device."""
        return TinyFineTuner(copy.deepcopy(self._net), name=self.name, device=self._device)

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> Tiny:
        """A new segmenter of the same architecture, device and batch size, with all the weights of `state`.

        Raises:
            ValueError: tensors of another architecture.
        """
        net = copy.deepcopy(self._net)
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            reasons = " ".join(str(error).split())[:400]
            raise ValueError(
                f"expected the tensors of `{self.name}` with widths {net.widths} and side {net.side}, got tensors that "
                f"do not fit: {reasons}; adapt this segmenter again"
            ) from error
        name = self.name.removesuffix(ADAPTED) + ADAPTED
        return Tiny(net, name=name, device=self._device, batch_size=self._batch_size)

    def _predict_batch(self, queries: Sequence[CropQuery]) -> list[_Output]:
        inputs = network_input(queries, self._device)
        planes = planes_of(inputs).contiguous(memory_format=torch.channels_last)
        added, score = self._net(planes)
        check_logits(bool(torch.isfinite(added).all() and torch.isfinite(score).all()), self.name)
        low_res = ellipse_logits(inputs.boxes, self._net.side, self._net.side) + added
        arrays = (tensor.cpu().numpy() for tensor in (added[:, 0], score, low_res[:, 0]))
        return [_in_image(query, *of_row) for query, *of_row in zip(queries, *arrays, strict=True)]


def open_tiny(path: Path, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> Tiny:
    """The segmenter with the weights of a file.

    Raises:
        UserError: see `load_tiny`.
    """
    return Tiny(load_tiny(path), name=name, device=device, batch_size=batch_size)


def _in_image(query: CropQuery, added: NDArray[np.float32], score: float, low_res: NDArray[np.float32]) -> _Output:
    """A row's output in the image's frame; the ellipse is drawn there, at the image's resolution."""
    size = query.embedding.size
    visible, where = query.window.paste(added, size)
    corner = [where[1].start, where[0].start] * 2
    # float64: rounding could put a border pixel of a large image on either side.
    box = torch.from_numpy(query.box.astype(np.float64) - corner)[None]
    logits = ellipse_logits(box, *visible.shape)[0, 0].numpy() + visible
    mask = np.zeros(size, np.bool_)
    mask[where] = logits >= 0
    stability = np.nan if query.jittered else float(stability_from_logits(logits))
    return _Output(mask, float(score), stability, low_res)


def _candidate(outputs: Sequence[_Output]) -> Candidate:
    """The candidate of one `Prompts` from the outputs of its own row and then of its jittered boxes."""
    own, *rest = outputs
    return Candidate(
        masks=own.mask[None],
        predicted_iou=np.array([own.predicted_iou], np.float32),
        stability_score=np.array([own.stability], np.float32),
        low_res_logits=own.low_res[None].copy(),
        jittered_masks=np.stack([output.mask for output in rest]) if rest else np.zeros((0, *own.mask.shape), np.bool_),
    )
