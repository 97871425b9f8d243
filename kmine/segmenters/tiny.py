"""`tiny`: a promptable segmenter small enough to ship, which looks at a crop around each box.

Legend: H, W the image's own frame, S the side of the crop's frame (`crop.py` converts), M = 1 mask a prompt.

It needs a box. Points and a hint are optional; what of them lies outside the crop (the box and `crop.MARGIN` of its
side around it) is not seen. Nothing outside the crop is ever part of an answer. Boxes over the image's border are
clipped, see `check_prompts`; a box as large as the image is answered with the image as its own context.

Unprompted it answers a grid of boxes (`tiny_grid.py`).

It can learn from labeled images (`Adaptable`); how, `tiny_train.py` says, on the same crops and prompts as here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kmine.records import Candidate, Prompts
from kmine.segmenters.base import (
    ADAPTED,
    AdaptPlan,
    Embedding,
    Proposals,
    check_images,
    check_logits,
    check_pairs,
    check_prompts,
    needs_box,
    stability_from_logits,
)
from kmine.segmenters.crop import Window, window_of
from kmine.segmenters.tiny_grid import propose
from kmine.segmenters.tiny_net import HINT_LIMIT, Asked, TinyNet, ellipse_logits, planes_of
from kmine.segmenters.tiny_weights import load_tiny, signature_of

if TYPE_CHECKING:
    from kmine.segmenters.tiny_train import TinyTrainee

NO_POINT = -1
"""Label of the padding where prompts of one batch have different numbers of points."""


@dataclass(frozen=True)
class Row:
    """One line of a batch: a prompt's own box, or one of its jittered boxes, with the same points and hint."""

    embedding: Embedding
    """With its image."""
    prompts: Prompts
    """Checked and clipped."""
    box: NDArray[np.float32]
    """(4,) XYXY in the image's frame."""
    jittered: bool
    window: Window


@dataclass(frozen=True)
class _Answer:
    mask: NDArray[np.bool_]  # (H, W)
    predicted_iou: float
    stability: float  # NaN for a jittered box, whose stability nobody asks for
    low_res: NDArray[np.float32]  # (S, S)


class Tiny:
    """A `Segmenter` around one `TinyNet`, which it owns from then on: its weights must not change any more."""

    adapt_plan = AdaptPlan(steps=200, batch_size=16, lr=5e-4)
    """A quarter of the learning rate of the first training: what was learnt there is to stay."""

    def __init__(self, net: TinyNet, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> None:
        """Takes a network to a device.

        Args:
            net: trained, or not: an untrained one answers with the ellipse.
            name: as tables name it.
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
        """Keeps (H, W, 3) uint8 RGB images of any sizes: the network looks at the pixels for every box anew.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
        """
        check_images(images)
        return [Embedding(size=(image.shape[0], image.shape[1]), image=image) for image in images]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Answers all boxes of all images together, `batch_size` a forward pass; M = 1 in every candidate.

        `low_res_logits` are (1, S, S) in the frame of the crop; masks are the same logits in the image's frame, at or
        above 0. `stability_score` is taken in the image's frame.

        Raises:
            UserError: prompts without a box.
            ValueError: embeddings without an image, or prompts that do not fit their image.
        """
        check_pairs(embeddings, prompts)
        rows = [
            row
            for embedding, of_image in zip(embeddings, prompts, strict=True)
            for one in of_image
            for row in rows_of(embedding, one, side=self._net.side, name=self.name)
        ]
        answers: list[_Answer] = []
        for start in range(0, len(rows), self._batch_size):
            answers += self._answer(rows[start : start + self._batch_size])
        left = iter(answers)
        return [[_candidate([next(left) for _ in range(1 + len(one.jittered_boxes))]) for one in p] for p in prompts]

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """What it answers to a grid of boxes, near-duplicates apart; see `tiny_grid`.

        Raises:
            ValueError: embeddings without an image.
        """
        return (propose(self, embedding) for embedding in embeddings)

    def trainee(self) -> TinyTrainee:
        """A copy to teach, on the same device: every weight learns, this segmenter stays as it is."""
        # Imported here: training is built on what this file shows the network.
        from kmine.segmenters.tiny_train import TinyTrainee

        return TinyTrainee(copy.deepcopy(self._net), name=self.name, device=self._device)

    def adapted(self, state: Mapping[str, torch.Tensor]) -> Tiny:
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
                f"expected the tensors of a trainee of `{self.name}`, widths {net.widths} and side {net.side}; "
                f"{reasons}; adapt again from this segmenter"
            ) from error
        name = self.name.removesuffix(ADAPTED) + ADAPTED
        return Tiny(net, name=name, device=self._device, batch_size=self._batch_size)

    def _answer(self, rows: Sequence[Row]) -> list[_Answer]:
        asked = asked_of(rows, self._device)
        planes = planes_of(asked).contiguous(memory_format=torch.channels_last)
        added, score = self._net(planes)
        check_logits(bool(torch.isfinite(added).all() and torch.isfinite(score).all()), self.name)
        low_res = ellipse_logits(asked.boxes, self._net.side, self._net.side) + added
        arrays = (tensor.cpu().numpy() for tensor in (added[:, 0], score, low_res[:, 0]))
        return [_in_image(row, *of_row) for row, *of_row in zip(rows, *arrays, strict=True)]


def open_tiny(path: Path, *, name: str = "tiny", device: str = "cpu", batch_size: int = 64) -> Tiny:
    """The segmenter with the weights of a file, see `load_tiny`.

    Raises:
        UserError: weights that are missing, damaged or of something else.
    """
    return Tiny(load_tiny(path), name=name, device=device, batch_size=batch_size)


def rows_of(embedding: Embedding, prompts: Prompts, *, side: int, name: str) -> Iterator[Row]:
    """The rows of one `Prompts`: its own box first, then its jittered boxes in order.

    Args:
        embedding: of the prompts' image, with the image.
        prompts: as they were asked, not yet checked.
        side: S, pixels of the crop.
        name: of the segmenter, for errors.

    Raises:
        UserError: prompts without a box.
        ValueError: an embedding without an image, or prompts that do not fit their image.
    """
    if embedding.image is None:
        raise ValueError(f"embedding: expected one of {name}, which keeps the image; encode the image again")
    checked = check_prompts(prompts, embedding.size)
    if checked.box is None:
        raise needs_box(name)
    for number, box in enumerate([checked.box, *checked.jittered_boxes]):
        yield Row(embedding, checked, box, number > 0, window_of(box, side))


def asked_of(rows: Sequence[Row], device: torch.device | str) -> Asked:
    """Crops and prompts of a batch of at least one row as tensors of the crop's frame: what the network is shown."""

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    most = max(_num_points(row.prompts) for row in rows)
    points = np.zeros((len(rows), most, 2), np.float32)
    labels = np.full((len(rows), most), NO_POINT, np.int64)
    for index, row in enumerate(rows):
        if row.prompts.point_coords is not None:
            count = _num_points(row.prompts)
            points[index, :count] = row.window.to_crop(row.prompts.point_coords)
            labels[index, :count] = row.prompts.point_labels
    crops = np.stack([row.window.take(row.embedding.image) for row in rows])
    has_hint = np.array([row.prompts.mask_input is not None for row in rows], np.float32)
    return Asked(
        image=tensor(crops).permute(0, 3, 1, 2).float(),
        limits=tensor(np.stack([row.window.limits(row.embedding.size) for row in rows])),
        boxes=tensor(np.stack([row.window.to_crop(row.box.reshape(2, 2)).ravel() for row in rows])),
        points=tensor(points),
        point_labels=tensor(labels),
        hint=tensor(np.stack([_hint(row) for row in rows]))[:, None],
        has_hint=tensor(has_hint),
    )


def inside_of(row: Row) -> NDArray[np.bool_]:
    """(S, S): which pixels of the crop show the image, and not what is repeated beyond its border."""
    x0, y0, x1, y1 = row.window.limits(row.embedding.size)
    at = np.arange(row.window.side)
    return ((at >= y0) & (at <= y1))[:, None] & ((at >= x0) & (at <= x1))


def _num_points(prompts: Prompts) -> int:
    return 0 if prompts.point_coords is None else len(prompts.point_coords)


def _hint(row: Row) -> NDArray[np.float32]:
    """(S, S) logits; beyond the image surely background, as in training; zeros without a hint."""
    side, hint = row.window.side, row.prompts.mask_input
    if hint is None:
        return np.zeros((side, side), np.float32)
    crop = row.window.take(np.clip(hint, -HINT_LIMIT, HINT_LIMIT, dtype=np.float32))
    return np.where(inside_of(row), crop, np.float32(-HINT_LIMIT))


def _in_image(row: Row, added: NDArray[np.float32], score: float, low_res: NDArray[np.float32]) -> _Answer:
    """An answer in the image's frame; the ellipse is drawn there, so it is as sharp as the image."""
    size = row.embedding.size
    part, where = row.window.put(added, size)
    corner = [where[1].start, where[0].start] * 2
    # float64: a border pixel of a large image could fall on either side by rounding.
    box = torch.from_numpy(row.box.astype(np.float64) - corner)[None]
    logits = ellipse_logits(box, *part.shape)[0, 0].numpy() + part
    mask = np.zeros(size, np.bool_)
    mask[where] = logits >= 0
    stability = np.nan if row.jittered else float(stability_from_logits(logits))
    return _Answer(mask, float(score), stability, low_res)


def _candidate(answers: Sequence[_Answer]) -> Candidate:
    """The answers to one `Prompts`, its own first and then its jittered boxes in order."""
    own, *rest = answers
    return Candidate(
        masks=own.mask[None],
        predicted_iou=np.array([own.predicted_iou], np.float32),
        stability_score=np.array([own.stability], np.float32),
        low_res_logits=own.low_res[None].copy(),
        jittered_masks=np.stack([one.mask for one in rest]) if rest else np.zeros((0, *own.mask.shape), np.bool_),
    )
