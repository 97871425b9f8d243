"""What every promptable segmenter is, and the checks that all of them share.

Legend: H, W height and width of an image in its own frame, P points, M masks of one candidate, N proposals of one
image, J jittered boxes, C, h, w channels and sides of an embedding. Arrays are (row, column); boxes are XYXY and points
(x, y), both in pixels of the image's own frame, where pixel (row 0, column 0) is the point (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.types import Candidate, Prompts

if TYPE_CHECKING:
    from torch import Tensor, nn


ADAPTED = "+adapted"
"""Ends the name of an adapted segmenter."""


@dataclass(frozen=True)
class Embedding:
    """What a segmenter keeps of one image, so that later prompts cost little."""

    size: tuple[int, int]
    """(H, W) of the image in its own frame."""
    features: NDArray[np.float32] | None = None
    """(C, h, w), or None for a segmenter that needs none."""
    image: NDArray[np.uint8] | None = None
    """(H, W, 3) RGB for a segmenter that looks at the pixels again; None for all others."""


class Segmenter(Protocol):
    """A model that turns prompts into masks."""

    name: str
    """As every table, row and figure names it."""

    @property
    def signature(self) -> str:
        """sha256, 64 hex digits, over architecture and weights: changes whenever a weight does."""
        ...

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Embeds (H, W, 3) uint8 RGB images of any sizes, in order.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
        """
        ...

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Answers the prompts of each image: one `Candidate` per `Prompts`, in order, jittered boxes included.

        Raises:
            ValueError: prompts that do not fit their image, see `check_prompts`.
        """
        ...


@dataclass(frozen=True)
class PromptedExample:
    """One question and its answer, to adapt a segmenter on."""

    embedding: Embedding
    prompts: Prompts
    mask: NDArray[np.bool_]
    """(H, W), the true object. Empty for a false alarm: it teaches the predicted IoU alone, no mask."""


@dataclass(frozen=True)
class FineTuneDefaults:
    """What suits a segmenter where the settings name nothing else."""

    steps: int
    batch_size: int
    """Lessons a step."""
    lr: float
    """Peak learning rate of AdamW."""


class FineTuner(Protocol):
    """A copy of a segmenter while it learns; the original stays as it is."""

    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        ...

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """The mean loss over lessons, a scalar with gradient; embeddings are used as they are, nothing is encoded.

        `seed` draws the augmentation, where there is one.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the tensors that learn."""
        ...


@runtime_checkable
class FineTunable(Segmenter, Protocol):
    """A segmenter that can learn from labeled images."""

    fine_tune_defaults: FineTuneDefaults

    def fine_tuner(self) -> FineTuner:
        """A copy to teach."""
        ...

    def with_weights(self, state: Mapping[str, Tensor]) -> Segmenter:
        """This segmenter with a trainee's tensors; its `name` ends in `+adapted`, its signature is another.

        Raises:
            ValueError: tensors of another architecture.
        """
        ...


@dataclass(frozen=True)
class Proposals:
    """What a segmenter finds in an image that nobody asked it about; each mask is one connected part, none is empty."""

    masks: NDArray[np.bool_]
    """(N, H, W)."""
    predicted_iou: NDArray[np.float32]
    """(N,) in [0, 1]."""
    stability_score: NDArray[np.float32]
    """(N,) in [0, 1]; NaN where it could not be had."""


@runtime_checkable
class AutomaticMaskGenerator(Segmenter, Protocol):
    """A segmenter that can also propose masks of a whole image, unprompted."""

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """One `Proposals` per embedding, in order, each made when it is asked for: the masks of one image are large.

        Embeddings are used as they are, nothing is encoded.

        Raises:
            ValueError: embeddings of another segmenter.
        """
        ...


def proposals_of(
    size: tuple[int, int],
    masks: Sequence[NDArray[np.bool_]],
    predicted_iou: Sequence[float],
    stability: Sequence[float],
) -> Proposals:
    """Proposals from (H, W) masks of an image of `size` = (H, W) and their scores; of each its largest part is left.

    A speck far from the rest would otherwise stretch the box that is asked about next.
    """
    return Proposals(
        masks=np.stack([_largest_component(mask) for mask in masks]) if len(masks) else np.zeros((0, *size), np.bool_),
        predicted_iou=np.clip(np.array(predicted_iou, np.float32), 0, 1),
        stability_score=np.array(stability, np.float32),
    )


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def box_required_error(name: str) -> UserError:
    """The error of a segmenter that answers boxes only, for prompts without one."""
    return UserError(
        f"prompts.box: the segmenter `{name}` expects a box, got points only; "
        "set --prompts.box true, or take another segmenter with --segmenter.name"
    )


def no_proposals_error(name: str) -> UserError:
    """The error of a segmenter that is asked for proposals and has none."""
    return UserError(
        f"prompts.source: auto expects a segmenter that proposes masks unprompted, got `{name}`, which only answers "
        "boxes; set --prompts.source local, or take tiny or a SAM with --segmenter.name"
    )


def check_logits(finite: bool, name: str) -> None:
    """Refuse an answer that holds a number that is none, before it passes for an empty mask.

    Raises:
        UserError: `finite` is false.
    """
    if not finite:
        raise UserError(
            f"the segmenter `{name}` gave NaN or infinite logits: its weights are damaged, or were trained to nothing; "
            "check --segmenter.checkpoint, and if it was adapted, lower --adapt.lr"
        )


def check_images(images: Sequence[NDArray[np.uint8]]) -> None:
    """Refuses everything that is not (H, W, 3) uint8: a float image would be normalised wrongly without a word.

    Raises:
        ValueError: says what was expected, what came, and the cure.
    """
    for index, image in enumerate(images):
        cure = _image_cure(image)
        if cure:
            raise ValueError(
                f"image {index}: expected (H, W, 3) uint8 RGB in [0, 255], got {image.dtype} of shape "
                f"{image.shape}; {cure}"
            )


def _image_cure(image: NDArray[np.generic]) -> str:
    """The cure for an unfit image; empty for a fit one."""
    if image.size == 0:
        return "it has no pixels: leave it out"
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        return "repeat a grey image over three channels: np.repeat(image.reshape(H, W, 1), 3, axis=2)"
    if image.ndim == 3 and image.shape[2] == 4:
        return "drop the alpha channel: image[..., :3]"
    if image.ndim != 3 or image.shape[2] != 3:
        return "bring the channels to the last axis and keep three"
    if image.dtype != np.uint8:
        return "scale to [0, 255] and convert: image.round().astype(np.uint8)"
    return ""


def check_pairs(embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> None:
    """Refuses a `decode` whose two lists differ in length.

    Raises:
        ValueError: lengths differ.
    """
    if len(embeddings) != len(prompts):
        raise ValueError(
            f"expected one list of prompts per embedding, got {len(prompts)} lists for {len(embeddings)} embeddings; "
            "an image without prompts takes an empty list"
        )


def check_prompts(prompts: Prompts, size: tuple[int, int]) -> Prompts:
    """The prompts as a segmenter may use them on an image of `size` = (H, W); the argument is not changed.

    A box that reaches over the border is clipped to x in [0, W], y in [0, H]: boxes that count their last pixel and
    boxes that end behind it both pass unchanged. Jittered boxes are treated alike.

    Raises:
        ValueError: neither box nor points, a box without area or outside the image, a point outside the image,
            a hint of another size; says what came and the cure.
    """
    if prompts.box is None and prompts.point_coords is None:
        raise ValueError("expected a box or at least one point, got neither; drop prompts without either beforehand")
    if prompts.box is None and len(prompts.jittered_boxes):
        raise ValueError(f"got {len(prompts.jittered_boxes)} jittered boxes without a box; jitter only what has a box")
    _check_points(prompts, size)
    _check_mask_input(prompts.mask_input, size)
    if prompts.box is None:
        return prompts
    boxes = np.concatenate([np.reshape(prompts.box, (1, 4)), np.reshape(prompts.jittered_boxes, (-1, 4))])
    clipped = clip_boxes(boxes, size)
    return replace(prompts, box=clipped[0], jittered_boxes=clipped[1:])


def clip_boxes(boxes: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    """(B, 4) XYXY clipped to an image of `size` = (H, W), as float32.

    Raises:
        ValueError: a box is not finite, has no area, or lies entirely outside the image.
    """
    height, width = size
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    # `not (a < b)` instead of `a >= b`: a NaN must fail, too.
    flat = ~((x0 < x1) & (y0 < y1)) | ~np.isfinite(boxes).all(axis=1)
    _refuse(boxes, flat, "expected XYXY with x0 < x1 and y0 < y1", "swap the corners, or grow the box by a pixel")
    outside = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
    _refuse(
        boxes,
        outside,
        f"it lies entirely outside the image, {width} wide and {height} high",
        "boxes are (x, y) in pixels of the image's own frame",
    )
    limits = np.array([width, height, width, height], np.float32)
    return np.clip(np.asarray(boxes, np.float32), 0, limits)


def _refuse(boxes: NDArray[np.floating], bad: NDArray[np.bool_], problem: str, cure: str) -> None:
    if bad.any():
        box = [round(float(value), 2) for value in boxes[int(bad.argmax())]]
        raise ValueError(f"box {box}: {problem}; {cure}")


def _check_points(prompts: Prompts, size: tuple[int, int]) -> None:
    coords, labels = prompts.point_coords, prompts.point_labels
    if coords is None and labels is None:
        return
    if coords is None or labels is None or coords.shape != (len(labels), 2) or len(labels) == 0:
        shapes = [None if array is None else array.shape for array in (coords, labels)]
        raise ValueError(
            f"expected point_coords (P, 2) and point_labels (P,), P >= 1, got shapes {shapes}; use None for no points"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"point_labels: expected 1 (foreground) or 0 (background), got {labels.tolist()}")
    height, width = size
    # Pixel (0, 0) is centred on the point (0, 0), so the image reaches half a pixel beyond its outermost centres.
    inside = (coords >= -0.5).all(axis=1) & (coords[:, 0] <= width - 0.5) & (coords[:, 1] <= height - 0.5)
    if not inside.all():
        raise ValueError(
            f"point {coords[int(inside.argmin())].tolist()} lies outside the image, {width} wide and {height} high; "
            "points are (x, y) in pixels of the image's own frame, not (row, column)"
        )


def _check_mask_input(mask_input: NDArray[np.float32] | None, size: tuple[int, int]) -> None:
    if mask_input is None:
        return
    if mask_input.shape != size:
        raise ValueError(
            f"mask_input: expected the image's own (H, W) = {size}, got {mask_input.shape}; resize the logits to the image"
        )
    if np.isnan(mask_input).any():
        raise ValueError("mask_input: expected logits, got NaN; leave the hint out")


def stability_from_logits(
    logits: NDArray[np.floating], threshold: float = 0.0, offset: float = 1.0
) -> NDArray[np.float32]:
    """IoU of the masks that a stricter and a laxer threshold would give, as segment-anything defines stability.

    Args:
        logits: (..., H, W), before any threshold.
        threshold: where the mask is cut.
        offset: how far the two thresholds lie from it.

    Returns:
        (...) in [0, 1]; NaN where even the laxer mask is empty (0/0).
    """
    inner = np.count_nonzero(logits > threshold + offset, axis=(-2, -1)).astype(np.float32)
    outer = np.count_nonzero(logits > threshold - offset, axis=(-2, -1)).astype(np.float32)
    return np.divide(inner, outer, out=np.full_like(inner, np.nan), where=outer > 0)
