"""A segmenter of a given quality, to measure what the loop gains from it; for tests and experiments.

It knows the true masks and returns the true object, degraded to a given IoU. It is a simulation: no figure made with it
is SAM's or any other model's, and its name marks it in every table. It does not simulate how a real model fails:
together with its prompt, more on hard images than on easy ones, or on another object than the prompted one.

The same seed gives the same segmenter at every IoU: errors at a higher IoU are a subset of those at a lower one.

    sys.path.insert(0, "tests")
    from helpers.simulated_segmenter import Simulated
    task = replace(task, segmenter=Simulated.from_pools([pool_with_true_masks], iou=0.85, seed=0))

Legend: H, W height and width of an image in its own frame. Boxes are XYXY in pixels, ends inclusive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.pool import Pool
from kmine.ops.masks import clip_box, components, grow_box, squared_depth, tight_box
from kmine.ops.metrics import iou as iou_of
from kmine.ops.seeding import derive_seed
from kmine.segmenters.base import Embedding, Proposals, check_images, check_pairs, check_prompts, proposals_of
from kmine.segmenters.ellipse import ellipse_mask
from kmine.types import IGNORE_INDEX, Candidate, Prompts

Bool = NDArray[np.bool_]

PUBLISHED_IOU = 0.85
"""SAM's published quality on polyps, prompted with true boxes."""
MIN_BOX_IOU = 0.1
"""A box selects the object whose box it overlaps most, if their IoU is at least this."""
BOX_SHARE = 0.3
"""Share of the deformation that differs from box to box, so that jittered boxes get slightly different masks."""
FALSE_PROPOSALS = 12
"""Ellipses among the proposals of an image, with sides of .05 to .4 of the image's."""
SCORE_SD = 0.1
"""Standard deviation of the predicted IoU about the true one."""
CELLS = ((5, 1.0), (15, 0.4))
"""Noise of the deformation: grid cells across the object's surroundings, and weight."""
RULE = "simulated segmenter, 2"
"""Part of the signature: increase the number when masks or scores change."""


class Output(NamedTuple):
    """Mask and score of one box."""

    mask: Bool
    predicted_iou: float


class Simulated:
    """A `Segmenter` that returns the true object, degraded to `iou`, and a false positive where there is none.

    A mask depends on image, object, box and seed alone. A prompt selects an object by its box; without a box, by its
    component, its mask input or its points. Where no true object of the prompt's class is selected, the mask is the
    ellipse in the box with a predicted IoU drawn from .2 to .8, a real model's confidence in false positives. Otherwise
    the predicted IoU is the true one with noise.
    `stability_score` is NaN.

    Args:
        truths: (H, W) uint8 class ids by `image_key` of the image, 255 for ignored pixels.
        iou: of every mask with the selected object, in (0, 1], as exact as whole pixels allow: within .01 for objects
            of 100 pixels or more and an `iou` of .4 or more. 1 gives the true object.
        seed: draws the deformations and the noise of the scores.

    Raises:
        ValueError: `iou` is not in (0, 1].
    """

    def __init__(self, truths: Mapping[str, NDArray[np.uint8]], iou: float = PUBLISHED_IOU, seed: int = 0) -> None:
        if not 0 < iou <= 1:
            raise ValueError(f"iou: expected a number above 0, at most 1, got {iou}")
        self.name = f"simulated_{iou:.2f}"
        self._truths = dict(truths)
        self._iou = float(iou)
        self._seed = seed
        digest = hashlib.sha256(f"{RULE} {self._iou!r} {seed}".encode())
        for key, mask in sorted(self._truths.items()):
            digest.update(f"{key} {mask.shape}".encode() + np.ascontiguousarray(mask, np.uint8).tobytes())
        self._signature = digest.hexdigest()

    @classmethod
    def from_pools(cls, pools: Iterable[Pool], iou: float = PUBLISHED_IOU, seed: int = 0) -> Simulated:
        """The segmenter for the images of `pools`, which must be opened with their true masks.

        They must include every image to segment: the unlabeled ones, and the labeled ones if a gate is calibrated.

        Raises:
            ValueError: a pool withholds its masks, or two images of equal pixels have different masks.
        """
        truths: dict[str, NDArray[np.uint8]] = {}
        for pool in pools:
            for sample_id in pool.ids:
                sample = pool.sample(sample_id)
                if sample.mask is None:
                    raise ValueError(f"{sample_id}: expected a pool with true masks, got one that withholds them")
                existing = truths.setdefault(image_key(sample.image), sample.mask)
                if not np.array_equal(existing, sample.mask):
                    raise ValueError(f"{sample_id}: another image has the same pixels, and another mask; remove one")
        return cls(truths, iou, seed)

    @property
    def signature(self) -> str:
        """sha256 of rule, IoU, seed and true masks."""
        return self._signature

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Keep the (H, W, 3) uint8 images, which are recognised by their pixels.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
        """
        check_images(images)
        return [Embedding(size=(image.shape[0], image.shape[1]), image=image) for image in images]

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """One mask per prompt, M = 1; a jittered box is treated like a box.

        Raises:
            ValueError: prompts that do not fit their image, or an image whose true mask is not known.
        """
        check_pairs(embeddings, prompts)
        return [
            self._decode_image(embedding, of_image) if of_image else []
            for embedding, of_image in zip(embeddings, prompts, strict=True)
        ]

    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """The masks of boxes around the true objects, and `FALSE_PROPOSALS` ellipses anywhere.

        A real generator misses some objects and returns parts of others: this one is better. `stability_score` is the
        predicted IoU.

        Raises:
            ValueError: an image whose true mask is not known.
        """
        for embedding in embeddings:
            key, truth = self._truth_of(embedding)
            found = []
            for class_id in sorted(set(np.unique(truth).tolist()) - {0, IGNORE_INDEX}):
                objects = components(truth == class_id)
                boxes = [grow_box(tight_box(part), 0.05, *truth.shape) for part in objects]
                found += [self._output((key, class_id), objects, box, truth.shape) for box in boxes]
            rng = np.random.default_rng(derive_seed(self._seed, key, "proposals"))
            for centre, sides in rng.uniform((0, 0.05), (1, 0.4), (FALSE_PROPOSALS, 2, 2)).swapaxes(1, 2):
                corners = np.concatenate([centre - sides / 2, centre + sides / 2]) * np.tile(truth.shape[::-1], 2)
                box = clip_box(corners.astype(np.float32), *truth.shape)
                found.append(Output(ellipse_mask(box, truth.shape), float(rng.uniform(0.2, 0.8))))
            found = [output for output in found if output.mask.any()]
            scores = [output.predicted_iou for output in found]
            yield proposals_of(embedding.size, [output.mask for output in found], scores, scores)

    def _truth_of(self, embedding: Embedding) -> tuple[str, NDArray[np.uint8]]:
        """Key and true mask of an image; `ValueError` for an unknown one."""
        key = "" if embedding.image is None else image_key(embedding.image)
        truth = self._truths.get(key)
        if truth is None or truth.shape != embedding.size:
            raise ValueError(
                f"embedding: expected one of the {len(self._truths)} images of the simulation, got an unknown one of "
                f"{embedding.size}; add the pool of this image"
            )
        return key, truth

    def _decode_image(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidate]:
        key, truth = self._truth_of(embedding)
        return [self._candidate(key, truth, check_prompts(prompt, embedding.size)) for prompt in prompts]

    def _candidate(self, key: str, truth: NDArray[np.uint8], prompts: Prompts) -> Candidate:
        objects = components(truth == prompts.class_id)
        boxes = [_selecting_box(prompts, objects, truth.shape), *prompts.jittered_boxes]
        best, *jittered = (self._output((key, prompts.class_id), objects, box, truth.shape) for box in boxes)
        return Candidate(
            masks=best.mask[None],
            predicted_iou=np.array([best.predicted_iou], np.float32),
            stability_score=np.full(1, np.nan, np.float32),
            low_res_logits=None,
            jittered_masks=np.array([output.mask for output in jittered], np.bool_).reshape(-1, *truth.shape),
        )

    def _output(
        self, key: tuple[str, int], objects: Sequence[Bool], box: NDArray[np.float32], size: tuple[int, int]
    ) -> Output:
        keys = (self._seed, *key)
        box_key = np.asarray(box, np.float32).tobytes().hex()
        scores = np.random.default_rng(derive_seed(*keys, box_key, "score"))
        number = _selected_object(box, objects)
        if number is None:
            return Output(ellipse_mask(box, size), float(scores.uniform(0.2, 0.8)))
        base, own = derive_seed(*keys, number), derive_seed(*keys, number, box_key)
        mask = degrade(objects[number], self._iou, base, own)
        score = iou_of(mask, objects[number]) + SCORE_SD * scores.standard_normal()
        return Output(mask, float(np.clip(score, 0, 1)))


def image_key(image: NDArray[np.uint8]) -> str:
    """Digest of an image's shape and pixels, by which it is recognised."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def degrade(truth: Bool, iou: float, base: int, own: int) -> Bool:
    """An object, (H, W), degraded to the given IoU with itself.

    The object is where its signed distance d is positive; the result is where d + strength * noise is, with smooth
    noise. A pixel is wrong from the strength |d / noise| on, if noise and d differ in sign: errors at a lower strength
    are a subset of those at a higher one, and each lowers the IoU. Errors are made in this order, as many as come
    nearest to the given IoU.

    Args:
        truth: not empty.
        iou: target.
        base: seed of the noise that all masks of the object share.
        own: seed of this mask's own noise.
    """
    window = _surroundings(truth)
    inside = truth[window].copy()
    signed = _signed_distance(inside)
    shared, apart = (_noise(np.random.default_rng(seed), inside.shape) for seed in (base, own))
    noise = (1 - BOX_SHARE) * shared + BOX_SHARE * apart
    # Mean 0 along the outline, so that parts of it move inwards and parts outwards.
    noise -= noise[np.abs(signed) <= max(2.0, 0.1 * float(np.sqrt(inside.sum())))].mean()
    falls = np.flatnonzero(signed * noise < 0)
    falls = falls[np.argsort(np.abs(signed.flat[falls] / noise.flat[falls]), kind="stable")]
    lost = np.cumsum(inside.flat[falls])
    added = np.arange(1, len(falls) + 1) - lost
    area = np.count_nonzero(inside)
    reached = np.concatenate([[1.0], (area - lost) / (area + added)])
    wrong = falls[: int(np.abs(reached - iou).argmin())]
    inside.flat[wrong] = ~inside.flat[wrong]
    out = np.zeros_like(truth)
    out[window] = inside
    return out


def _surroundings(truth: Bool) -> tuple[slice, slice]:
    """Rows and columns of the object's box grown by half its sides, which contain all errors."""
    x0, y0, x1, y1 = np.rint(grow_box(tight_box(truth), 0.5, *truth.shape, min_px=3)).astype(int).tolist()
    return slice(y0, y1 + 1), slice(x0, x1 + 1)


def _signed_distance(inside: Bool) -> NDArray[np.float64]:
    """(H, W) distance to the outline in pixels, positive inside; the image's border counts as outline."""
    padded = np.pad(inside, 1)
    deep, far = (np.sqrt(squared_depth(part)) for part in (padded, ~padded))
    return np.where(padded, deep - 0.5, 0.5 - far)[1:-1, 1:-1]


def _noise(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W) smooth noise: small random grids, enlarged."""
    return sum(
        weight * cv2.resize(rng.standard_normal((cells, cells)), shape[::-1], interpolation=cv2.INTER_CUBIC)
        for cells, weight in CELLS
    )


def _selecting_box(prompts: Prompts, objects: Sequence[Bool], size: tuple[int, int]) -> NDArray[np.float32]:
    """(4,) the box, or one around the component, mask input or points; its area is positive."""
    if prompts.box is not None:
        return prompts.box
    coords, labels = prompts.point_coords, prompts.point_labels
    mask = None if prompts.mask_input is None else prompts.mask_input > 0
    columns, rows = np.clip(np.rint(coords[labels == 1]), 0, [size[1] - 1, size[0] - 1]).astype(int).T
    under = (part for part in objects if part[rows, columns].any())
    for part in (prompts.component, mask, next(under, None)):
        if part is not None and part.any():
            return grow_box(tight_box(part), 0.05, *size)
    about = np.concatenate([coords.min(axis=0), coords.max(axis=0)]).astype(np.float32)
    return grow_box(about, 0.0, *size, min_px=max(size) / 16)


def _selected_object(box: NDArray[np.float32], objects: Sequence[Bool]) -> int | None:
    """Number of the object whose box overlaps `box` most, or None."""
    overlaps = [_box_iou(box, tight_box(part)) for part in objects]
    return int(np.argmax(overlaps)) if overlaps and max(overlaps) >= MIN_BOX_IOU else None


def _box_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of two boxes, ends inclusive."""
    corners = np.stack([a, b]).astype(np.float64)
    areas = np.prod(corners[:, 2:] - corners[:, :2] + 1, axis=1)
    shared = np.prod(np.clip(corners[:, 2:].min(axis=0) - corners[:, :2].max(axis=0) + 1, 0, None))
    return float(shared / (areas.sum() - shared))
