"""The protocol of a promptable segmenter, and the checks that all segmenters share.

Legend and frames as in `kmine.types`; N proposals of one image, C, h, w channels and sides of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.types import Bool, Candidate, Prompts

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTED = "+adapted"
"""Suffix of a fine-tuned segmenter's name."""
MASK_INPUT_CLIP = 7.0
"""Mask inputs are clipped to +- this, about the range of SAM's own logits; sigmoid(7) is 0.999. With larger logits
segment-anything returns the mask input itself."""


@dataclass(frozen=True)
class Embedding:
    """An encoded image; any number of prompts can be decoded on it."""

    size: tuple[int, int]
    """(H, W) of the image in its own frame."""
    features: NDArray[np.float32] | None = None
    """(C, h, w), or None for a segmenter without an image encoder."""
    image: NDArray[np.uint8] | None = None
    """(H, W, 3) RGB for a segmenter that reads pixels when it decodes; None for all others."""


@dataclass(frozen=True)
class Abilities:
    """What a segmenter takes and returns. What it lacks is left out of its prompts and of the gate's evidence."""

    box: bool = True
    """Takes boxes."""
    points: bool = True
    """Takes points."""
    mask_input: bool = True
    """Takes mask inputs."""
    predicted_iou: bool = True
    """Predicts the IoU of its masks; without, `Candidate.predicted_iou` is NaN."""


ALL_ABILITIES = Abilities()


def abilities_of(segmenter: object) -> Abilities:
    """A segmenter's `abilities`, an attribute that it may leave out if it lacks none."""
    return getattr(segmenter, "abilities", ALL_ABILITIES)


def without_missing(prompts: Prompts, abilities: Abilities) -> Prompts:
    """The prompts without what a segmenter of these abilities does not take."""
    if prompts.mask_input is not None and not abilities.mask_input:
        prompts = replace(prompts, mask_input=None)
    if prompts.point_coords is not None and prompts.box is not None and not abilities.points:
        prompts = replace(prompts, point_coords=None, point_labels=None)
    if prompts.box is not None and prompts.point_coords is not None and not abilities.box:
        none = np.zeros((0, 4), np.float32)
        prompts = replace(prompts, box=None, jittered_boxes=none, scaled_boxes=none)
    return prompts


class Segmenter(Protocol):
    """A model that turns prompts into masks.

    `kmine.segmenters.register_segmenter` gives one a name in the settings; `check_images`, `check_pairs` and
    `check_prompts` check its inputs. Extensions: `AutomaticMaskGenerator` (prompts.source auto), `FineTunable`
    (adapt.enabled), and an attribute `abilities` (`Abilities`) of one that does not take or return everything.
    """

    name: str
    """Appears in tables, figures and run folders."""

    @property
    def signature(self) -> str:
        """sha256, 64 hex digits, of architecture and weights: equal signatures, equal masks; stored in run folders."""

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """One embedding per image, in order; images are (H, W, 3) uint8 RGB in [0, 255] of any sizes.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
        """

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Segment the prompts of each image, jittered boxes included.

        Args:
            embeddings: from `encode`.
            prompts: one list per embedding, possibly empty; all in the image's own frame.

        Returns:
            One list per embedding with one `Candidate` per `Prompts`, in order.

        Raises:
            UserError: prompts without a box, from a segmenter that needs one.
            ValueError: prompts that do not fit their image, see `check_prompts`.
        """


@dataclass(frozen=True)
class PromptedExample:
    """A training example of a segmenter."""

    embedding: Embedding
    prompts: Prompts
    mask: NDArray[np.bool_]
    """(H, W), the true object. Empty for a false positive prompt: then only the predicted IoU has a loss."""


@dataclass(frozen=True)
class FineTuneDefaults:
    """Settings of fine-tuning where the config has none."""

    steps: int
    batch_size: int
    """Examples per step."""
    lr: float
    """Peak learning rate of AdamW."""


class FineTuner(Protocol):
    """A trainable copy of a segmenter; the original does not change."""

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters."""

    def loss(self, examples: Sequence[PromptedExample], seed: int) -> Tensor:
        """Mean loss over at least one example, a scalar with gradient; `seed` draws the augmentation, if any."""

    def state(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors, on the CPU."""


@runtime_checkable
class FineTunable(Segmenter, Protocol):
    """A segmenter that can be trained on labeled images."""

    fine_tune_defaults: FineTuneDefaults

    def fine_tuner(self) -> FineTuner:
        """A trainable copy."""

    def with_weights(self, state: Mapping[str, Tensor]) -> Segmenter:
        """This segmenter with the tensors of `FineTuner.state`; its `name` ends in `+adapted`, its signature differs.

        Raises:
            ValueError: tensors of another architecture.
        """


@dataclass(frozen=True)
class Proposals:
    """Masks of an image without prompts; each mask is one connected component and not empty."""

    masks: NDArray[np.bool_]
    """(N, H, W)."""
    predicted_iou: NDArray[np.float32]
    """(N,) in [0, 1]."""
    stability_score: NDArray[np.float32]
    """(N,) in [0, 1]; NaN where unknown."""


@runtime_checkable
class MemorySegmenter(Segmenter, Protocol):
    """A segmenter that finds an object again in an image after it was shown others with its mask."""

    def sign_memory(self) -> str:
        """As `signature`, of all that recalled masks depend on; a method, as it may load the memory's weights."""

    def recall(
        self, memory: Sequence[tuple[NDArray[np.uint8], Bool]], frames: Iterable[NDArray[np.uint8]], *, track: bool
    ) -> Iterator[Bool]:
        """(H, W) mask of the object in each of `frames`, in order, lazily; empty where it is not seen.

        Args:
            memory: images, (H, W, 3) uint8 RGB, and the object's mask in each; at least one.
            frames: further images, of any sizes.
            track: whether these follow each other, as slices do: each is remembered for the next. Else each is seen
                with `memory` alone.
        """


@runtime_checkable
class AutomaticMaskGenerator(Segmenter, Protocol):
    """A segmenter that also proposes masks of a whole image without prompts."""

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """One `Proposals` per embedding, in order, lazily: the masks of one image are large.

        Raises:
            ValueError: embeddings of another segmenter.
        """


def candidate_of(rows: Sequence[Candidate]) -> Candidate:
    """The candidate of one `Prompts` from those of its own box and of its jittered boxes, each decoded alone."""
    own, *jittered = rows
    best = [row.masks[int(row.predicted_iou.argmax())] for row in jittered]
    masks = np.array(best, np.bool_).reshape(-1, *own.masks.shape[1:])
    return replace(own, predicted_iou=own.predicted_iou.clip(0, 1), jittered_masks=masks)


def proposals_of(
    size: tuple[int, int], masks: Sequence[Bool], predicted_iou: Sequence[float], stability: Sequence[float]
) -> Proposals:
    """Proposals from non-empty (H, W) masks of an image of `size` = (H, W), reduced to their largest components.

    A distant speck would enlarge the box of the next prompt.
    """
    return Proposals(
        masks=np.array([_largest_component(mask) for mask in masks], np.bool_).reshape(-1, *size),
        predicted_iou=np.clip(np.array(predicted_iou, np.float32), 0, 1),
        stability_score=np.array(stability, np.float32),
    )


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def box_required_error(name: str) -> UserError:
    """Error for prompts without a box, from a segmenter that needs one."""
    return UserError(
        f"prompts.box: the segmenter `{name}` expects a box, got points only; "
        "set --prompts.box true, or choose another segmenter with --segmenter.name"
    )


def no_proposals_error(name: str) -> UserError:
    """Error for prompts.source auto with a segmenter that is no `AutomaticMaskGenerator`."""
    return UserError(
        f"prompts.source: auto expects a segmenter that proposes masks unprompted, got `{name}`; "
        "set --prompts.source local, or choose tiny or a SAM with --segmenter.name"
    )


def no_memory_error(name: str) -> UserError:
    """Error for prompts.source memory with a segmenter that is no `MemorySegmenter`."""
    return UserError(
        f"prompts.source: memory expects a SAM 2 with its video model, got `{name}`; set --prompts.source local, or "
        "--segmenter.name hf:facebook/sam2.1-hiera-tiny"
    )


def check_logits(finite: bool, name: str) -> None:
    """Raise `UserError` unless `finite`: NaN and infinite logits would become an empty mask."""
    if not finite:
        raise UserError(
            f"segmenter `{name}`: expected finite logits, got NaN or infinity: its weights are damaged, or fine-tuning "
            "diverged; check --segmenter.checkpoint, and lower --adapt.lr if it was adapted"
        )


def check_images(images: Sequence[NDArray[np.uint8]]) -> None:
    """Raise `ValueError` for an image that is not (H, W, 3) uint8: a float image would be normalised wrongly."""
    for index, image in enumerate(images):
        if cure := _image_cure(image):
            raise ValueError(
                f"image {index}: expected (H, W, 3) uint8 RGB in [0, 255], got {image.dtype} of shape "
                f"{image.shape}; {cure}"
            )


def _image_cure(image: NDArray[np.generic]) -> str:
    """How to mend an unfit image; empty for a fit one."""
    if image.size == 0:
        return "it has no pixels: remove it"
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
    """Raise `ValueError` for arguments of `decode` that differ in length."""
    if len(embeddings) != len(prompts):
        raise ValueError(
            f"expected one list of prompts per embedding, got {len(prompts)} lists for {len(embeddings)} embeddings; "
            "use an empty list for an image without prompts"
        )


def check_prompts(prompts: Prompts, size: tuple[int, int]) -> Prompts:
    """Validated copy of prompts for an image of `size` = (H, W), its boxes and jittered boxes clipped to it.

    They are clipped to x in [0, W], y in [0, H]: inclusive and exclusive ends both pass unchanged.

    Raises:
        ValueError: neither box nor points, a box without area or outside the image, a point outside the image,
            a mask input of another size or with NaN.
    """
    if prompts.box is None and prompts.point_coords is None:
        raise ValueError("expected a box or at least one point, got neither; remove such prompts")
    if prompts.box is None and len(prompts.jittered_boxes):
        raise ValueError(f"expected no jittered boxes without a box, got {len(prompts.jittered_boxes)}; add the box")
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
    # `not (a < b)` instead of `a >= b`, so that NaN fails.
    flat = ~((x0 < x1) & (y0 < y1)) | ~np.isfinite(boxes).all(axis=1)
    _refuse(boxes, flat, "expected XYXY with x0 < x1 and y0 < y1", "swap the corners, or grow the box by a pixel")
    outside = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
    problem = f"it lies entirely outside the image, {width} wide and {height} high"
    _refuse(boxes, outside, problem, "boxes are XYXY in pixels of the image's own frame")
    return np.clip(np.asarray(boxes, np.float32), 0, np.array([width, height, width, height], np.float32))


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
            f"mask_input: expected the image's own (H, W) = {size}, got {mask_input.shape}; resize it to the image"
        )
    if np.isnan(mask_input).any():
        raise ValueError("mask_input: expected logits, got NaN; use None instead")


def check_example(example: PromptedExample) -> None:
    """Raise `ValueError` for a mask of another size than its image: resizing it would hide a transposed mask."""
    size, shape = example.embedding.size, example.mask.shape
    if shape != size:
        raise ValueError(f"example: expected a mask of the image's own (H, W) = {size}, got {shape}; resize neither")


def stability_from_logits(
    logits: NDArray[np.floating], threshold: float = 0.0, offset: float = 1.0
) -> NDArray[np.float32]:
    """IoU of the masks of (..., H, W) logits at `threshold` +- `offset`, segment-anything's definition of stability.

    Returns (...) in [0, 1]; NaN where the larger mask is empty (0/0).
    """
    inner = np.count_nonzero(logits > threshold + offset, axis=(-2, -1)).astype(np.float32)
    outer = np.count_nonzero(logits > threshold - offset, axis=(-2, -1)).astype(np.float32)
    return np.divide(inner, outer, out=np.full_like(inner, np.nan), where=outer > 0)
