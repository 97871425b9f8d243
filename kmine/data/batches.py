"""Training batches, read ahead: a function of (seed, round, step), independent of workers and earlier steps.

B images of a batch, U unlabeled images, S the side of an image in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.augment import Augment, crop, import_albumentations
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.ops.seeding import derive_seed

B = TypeVar("B")
T = TypeVar("T")


@lru_cache(maxsize=8)
def _permutation(length: int, *keys: int | str) -> NDArray[np.int64]:
    """The order of an epoch, kept, since each of its images asks for it."""
    return np.random.default_rng(derive_seed(*keys)).permutation(length)


@dataclass(frozen=True)
class Views:
    """Weak and strong views of U unlabeled images, with the same geometric change."""

    weak: NDArray[np.uint8]
    """(U, S, S, 3) RGB, colours and sharpness unchanged."""
    strong: NDArray[np.uint8]
    """(V*U, S, S, 3) RGB, V views of all images in turn, colours and sharpness changed; with `view_cutmix`, rectangles
    of one another pasted in."""
    valid: NDArray[np.bool_]
    """(U, S, S), pixels of `weak` inside the image."""
    source: NDArray[np.int64]
    """(V*U, S, S), index of the weak view that the pixel of `strong` comes from; -1 outside an image."""


@dataclass(frozen=True)
class Batch:
    """Training images with masks."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    masks: NDArray[np.uint8]
    """(B, S, S) class ids, 255 = ignore."""
    weights: NDArray[np.float32]
    """(B,), or (B, S, S) after CutMix of images of different weights."""
    pseudo: NDArray[np.bool_] | None = None
    """(B,), images with pseudo masks; None: none of them."""
    views: Views | None = None
    """Unlabeled images; None: none."""


@dataclass(frozen=True)
class LabelBatch:
    """Training images with image-level labels."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    labels: NDArray[np.float32]
    """(B,), 1 for an image with a lesion, else 0."""


@dataclass(frozen=True)
class BatchPlan:
    """Composition and augmentation of the batches of a training."""

    seed: int
    round_idx: int
    batch_size: int
    """Images with masks and unlabeled images together, at least 2."""
    augment: Augment
    """For labeled images."""
    strong: Augment | None = None
    """For pseudo-labeled images and strong views; default: `augment`."""
    labeled_share: float = 1.0
    """Share of labeled images, rounded, at least one image; ignored where there are no others."""
    max_empty_share: float = 1.0
    """Largest share, in [0, 1], of images with empty masks among the pseudo-labeled ones."""
    cutmix: float = 0.0
    """Probability of CutMix for each image with a mask, see `cutmix`."""
    view_cutmix: float = 0.0
    """Probability of CutMix for each strong view."""
    num_strong: int = 1
    """Strong views of an unlabeled image: V of `Views`."""
    patch: int | None = None
    """Side of the squares that images are cut to, see `crop`; None: whole images."""


class _Stream(ABC, Generic[B]):
    """Batches by step, read ahead."""

    keys: tuple[int | str, ...]
    """Seed keys of all draws."""

    @abstractmethod
    def __getitem__(self, step: int) -> B:
        """The batch of `step` (0, 1, ...)."""

    def _draw(self, items: Sequence[T], name: str, step: int, count: int) -> list[T]:
        """The `count` items of `step`; items are drawn in shuffled epochs."""
        first = step * count
        return [self._nth(items, name, n) for n in range(first, first + count)]

    def _nth(self, items: Sequence[T], name: str, n: int) -> T:
        epoch, place = divmod(n, len(items))
        return items[_permutation(len(items), *self.keys, name, epoch)[place]]

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[B]:
        """Batches of the steps [start, stop), read ahead by `num_workers` processes (0: one thread)."""
        if num_workers == 0:
            yield from self._stream_thread(start, stop)
            return
        import torch
        from torch.utils.data import DataLoader

        import_albumentations()  # once, not in every process
        options = {"sampler": range(start, stop), "batch_size": None, "num_workers": num_workers}
        options |= {"collate_fn": _as_tensors, "worker_init_fn": _one_thread, "pin_memory": torch.cuda.is_available()}
        loader = DataLoader(self, **options)  # type: ignore[arg-type]  # the loader needs __getitem__ only
        yield from map(_as_arrays, loader)

    def _stream_thread(self, start: int, stop: int) -> Iterator[B]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kmine-batches") as executor:
            ahead = executor.submit(self.__getitem__, start) if start < stop else None
            for step in range(start, stop):
                current, ahead = ahead, executor.submit(self.__getitem__, step + 1) if step + 1 < stop else None
                yield current.result()


class Batches(_Stream[Batch]):
    """Labeled and pseudo-labeled images in a fixed ratio; `self[step]` is the batch of that step.

    Each pool is drawn in shuffled epochs, so every image occurs equally often. Exceptions among the pseudo-labeled
    images: those of weight 0 are left out, and empty ones get at most `plan.max_empty_share` of the places (in a single
    batch, that share rounded up), unless all are empty.

    Images of `labeled` have weight 1; `plan.view_cutmix` is not used.
    """

    own: Callable[[int], slice] = slice  # slots that this process reads; the others are 0, and the caller mixes

    def __init__(self, labeled: Pool, pseudo: Pool | None, plan: BatchPlan) -> None:
        self.labeled, self.pseudo, self.plan = labeled, pseudo, plan
        self.keys = (plan.seed, plan.round_idx)
        counted = [i for i in pseudo.ids if pseudo.weight(i) > 0] if pseudo is not None else []
        self._empty = [i for i in counted if i in pseudo.empty]
        self._full = [i for i in counted if i not in pseudo.empty]
        self.num_pseudo = _num_others(plan.batch_size, plan.labeled_share) if counted else 0
        self.num_labeled = plan.batch_size - self.num_pseudo
        self._empty_rate = Fraction(0)
        """Mean number of empty masks per batch."""
        if self._empty:
            share = Fraction(len(self._empty), len(counted))
            most = Fraction(plan.max_empty_share).limit_denominator(1000) if self._full else 1
            self._empty_rate = self.num_pseudo * min(share, most)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...)."""
        plan = self.plan
        labeled_ids = self._draw(self.labeled.ids, "labeled", step, self.num_labeled)
        pseudo_ids = self._draw_pseudo(step)
        drawn = [(self.labeled, plan.augment, i) for i in labeled_ids]
        drawn += [(self.pseudo, plan.strong or plan.augment, i) for i in pseudo_ids]
        slots = range(len(drawn))
        pairs = {slot: self._read(*drawn[slot], step, slot) for slot in slots[self.own(len(drawn))]}
        blank = tuple(map(np.zeros_like, next(iter(pairs.values()))))
        images, masks = map(np.stack, zip(*(pairs.get(slot, blank) for slot in slots), strict=True))
        weights = np.array([1.0] * len(labeled_ids) + [self.pseudo.weight(i) for i in pseudo_ids], np.float32)
        batch = Batch(images, masks, weights, np.arange(len(drawn)) >= len(labeled_ids))
        return self.mix(batch, step) if len(pairs) == len(drawn) else batch

    def mix(self, batch: Batch, step: int) -> Batch:
        """The whole batch of `step` with its CutMix."""
        return cutmix(batch, self.plan.cutmix, (*self.keys, step, "cutmix")) if self.plan.cutmix else batch

    def _draw_pseudo(self, step: int) -> list[str]:
        """Pseudo-labeled images of `step`, empty ones last."""
        before, after = int(step * self._empty_rate), int((step + 1) * self._empty_rate)
        full = range(step * self.num_pseudo - before, (step + 1) * self.num_pseudo - after)
        drawn = [self._nth(self._full, "pseudo", n) for n in full]
        return drawn + [self._nth(self._empty, "empty", n) for n in range(before, after)]

    def _read(
        self, pool: Pool, augment: Augment, sample_id: str, step: int, slot: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        seed = derive_seed(*self.keys, step, slot, sample_id)
        return augment(*crop(pool.image_resized(sample_id), pool.mask_resized(sample_id), self.plan.patch, seed), seed)


class ViewBatches(Batches):
    """Labeled images, and unlabeled images in two views in place of the pseudo-labeled ones of `Batches`.

    The labeled images are those of `Batches` with the same plan. Unlabeled images are drawn in shuffled epochs; their
    masks are not read and may be withheld. Weak and strong views share the geometric change. `plan.max_empty_share` is
    not used.

    Raises:
        UserError: `labeled_share` leaves no place for unlabeled images, or there are none.
    """

    def __init__(self, labeled: Pool, unlabeled: Pool, plan: BatchPlan) -> None:
        self.num_unlabeled = places_for_unlabeled(unlabeled, plan.batch_size, plan.labeled_share)
        num_labeled = plan.batch_size - self.num_unlabeled
        # CutMix needs two images.
        mixing = plan.cutmix if num_labeled > 1 else 0.0
        super().__init__(labeled, None, replace(plan, batch_size=num_labeled, labeled_share=1.0, cutmix=mixing))
        self.unlabeled = unlabeled
        self.strong = plan.strong or plan.augment
        options = {"symmetry": self.strong.symmetry, "supersample": self.strong.supersample}
        self.weak = Augment(self.strong.size, self.strong.enabled, geometric_only=True, **options)
        self.colours = Augment(self.strong.size, self.strong.enabled, self.strong.strong, colours_only=True)
        self.view_cutmix = plan.view_cutmix if self.num_unlabeled > 1 else 0.0

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...)."""
        return replace(super().__getitem__(step), views=self._views(step))

    def _views(self, step: int) -> Views:
        drawn = self._draw(self.unlabeled.ids, "unlabeled", step, self.num_unlabeled)
        pairs = [self._two_views(i, step, slot) for slot, i in enumerate(drawn, self.num_labeled)]
        weak, strong, valid = map(np.stack, zip(*pairs, strict=True))
        source = np.where(valid, np.arange(len(drawn))[:, None, None], -1)
        keys, mixed = (*self.keys, step, "cutmix of views"), []
        for view in range(self.plan.num_strong):
            if view:
                strong = np.stack([self._recoloured(image, step, view, slot) for slot, image in enumerate(weak)])
            batch = Batch(strong, source, np.ones(len(drawn), np.float32))
            mixed.append(cutmix(batch, self.view_cutmix, (*keys, view) if view else keys))
        images, sources = (np.concatenate([getattr(one, name) for one in mixed]) for name in ("images", "masks"))
        return Views(weak, images, valid, sources)

    def _recoloured(self, weak: NDArray[np.uint8], step: int, view: int, slot: int) -> NDArray[np.uint8]:
        """Another strong view from the weak one: the same place, other colours and sharpness."""
        blank = np.zeros(weak.shape[:2], np.uint8)
        return self.colours(weak, blank, derive_seed(*self.keys, step, "strong view", view, slot))[0]

    def _two_views(self, sample_id: str, step: int, slot: int) -> tuple[NDArray[np.uint8], ...]:
        """Weak and strong view of an image, and a mask of the pixels inside it."""
        image, seed = self.unlabeled.image_resized(sample_id), derive_seed(*self.keys, step, slot, sample_id)
        image, blank = crop(image, self.unlabeled.blank_mask(sample_id), self.plan.patch, seed)
        weak, outside = self.weak(image, blank, seed)
        return weak, self.strong(image, blank, seed)[0], outside == 0


def _num_others(batch_size: int, labeled_share: float) -> int:
    """Images of a batch that are not labeled."""
    return batch_size - max(1, round(labeled_share * batch_size))


def places_for_unlabeled(unlabeled: Pool, batch_size: int, labeled_share: float) -> int:
    """Number of unlabeled images in a batch; raises `UserError` for 0."""
    places = _num_others(batch_size, labeled_share)
    if not len(unlabeled):
        raise UserError("expected unlabeled images to train on, got none; label fewer, or use a method that needs none")
    if not places:
        raise UserError(
            f"fit.labeled_share: expected a share that leaves unlabeled images a place in a batch of {batch_size}, got "
            f"{labeled_share}; lower it, or enlarge fit.batch_size"
        )
    return places


def cutmix(batch: Batch, probability: float, keys: tuple[int | str, ...]) -> Batch:
    """CutMix: paste a rectangle of another image of the batch into an image, with its mask and weight.

    After UniMatch (arXiv 2208.09910), own reading: the rectangle covers 2 to 40 % of the image and has an aspect ratio
    of up to 3.3. Labeled and pseudo-labeled images mix with one another. Rectangles are taken from the original images,
    so the order of the images does not matter.

    Args:
        batch: at least 2 images of one weight each; not modified.
        probability: chance of an image to receive a rectangle.
        keys: seed keys; completed by the position of the image in the batch.
    """
    images, masks, weights = batch.images.copy(), batch.masks.copy(), batch.weights
    if (weights != weights[0]).any():
        weights = np.broadcast_to(weights[:, None, None], masks.shape).copy()
    size = masks.shape[1]
    for slot in range(len(masks)):
        rng = np.random.default_rng(derive_seed(*keys, slot))
        if rng.random() >= probability:
            continue
        other = (slot + 1 + rng.integers(len(masks) - 1)) % len(masks)
        window = _rectangle(rng, size)
        images[slot][window], masks[slot][window] = batch.images[other][window], batch.masks[other][window]
        if weights.ndim == 3:
            weights[slot][window] = batch.weights[other]
    return replace(batch, images=images, masks=masks, weights=weights)


def _rectangle(rng: np.random.Generator, size: int) -> tuple[slice, slice]:
    """Rows and columns of a random rectangle inside a square of side `size`."""
    area, shape = rng.uniform(0.02, 0.4), np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
    sides = [min(size, max(1, round(size * np.sqrt(area * s)))) for s in (shape, 1 / shape)]
    corner = [int(rng.integers(size - side + 1)) for side in sides]
    return slice(corner[0], corner[0] + sides[0]), slice(corner[1], corner[1] + sides[1])


class LabelBatches(_Stream[LabelBatch]):
    """Images with image-level labels; masks are not read, so pools may withhold them.

    Half of every batch (rounded down) are images with a lesion, whatever their share in the pools: lesions are rare,
    and small random batches would often hold none. The probabilities of a classifier trained so assume a prevalence of
    one half; their order, and the AUC, are not affected. (Own choice.)

    `augment` may move a lesion near the border out of the image; the label is then wrong for that step.
    """

    def __init__(
        self, pools: Sequence[Pool], augment: Augment, *, batch_size: int, seed: int, shuffle: bool = False
    ) -> None:
        """Use all labeled images of `pools`; `shuffle` permutes the labels, as a control.

        Raises:
            UserError: no image with a lesion, or none without.
        """
        images = [(pool, i, pool.image_label(i)) for pool in pools for i in pool.ids]
        if shuffle:
            order = np.random.default_rng(derive_seed(seed, "shuffled image labels")).permutation(len(images))
            images = [(pool, i, images[other][2]) for (pool, i, _), other in zip(images, order, strict=True)]
        self.positive = [(pool, i) for pool, i, label in images if label]
        self.negative = [(pool, i) for pool, i, label in images if label == 0]
        if not self.positive or not self.negative:
            raise UserError(
                "image-level labels: expected training images with a lesion and images without, got "
                f"{len(self.positive)} with, {len(self.negative)} without and "
                f"{sum(label is None for *_, label in images)} of unknown label; a classifier needs both"
            )
        self.augment = augment
        self.num_positive, self.num_negative = batch_size // 2, batch_size - batch_size // 2
        self.keys = (seed, "image_label")

    def __getitem__(self, step: int) -> LabelBatch:
        """The batch of `step` (0, 1, ...): images with a lesion first."""
        drawn = self._draw(self.positive, "positive", step, self.num_positive)
        drawn += self._draw(self.negative, "negative", step, self.num_negative)
        images = [self._read(pool, sample_id, step, slot) for slot, (pool, sample_id) in enumerate(drawn)]
        labels = np.arange(len(images)) < self.num_positive
        return LabelBatch(np.stack(images), labels.astype(np.float32))

    def _read(self, pool: Pool, sample_id: str, step: int, slot: int) -> NDArray[np.uint8]:
        image = pool.image_resized(sample_id)
        blank = np.zeros(image.shape[:2], np.uint8)
        return self.augment(image, blank, derive_seed(*self.keys, step, slot, sample_id))[0]


def _as_tensors(value: Any) -> Any:
    """A batch whose arrays pass from one process to another without a copy, and which can be pinned."""
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value and (type(value), {name: _as_tensors(field) for name, field in vars(value).items()})


def _as_arrays(value: Any) -> Any:
    """The inverse of `_as_tensors`; arrays share the memory of the tensors."""
    if value is None or hasattr(value, "numpy"):
        return value if value is None else value.numpy()
    kind, fields = value
    return kind(**{name: _as_arrays(field) for name, field in fields.items()})


def _one_thread(worker: int) -> None:
    """Processes are as many as there shall be threads."""
    import cv2

    cv2.setNumThreads(0)
