"""Training batches: which images stand in which step, read ahead of the training.

A batch is a function of (seed, round, step) alone. Nothing else decides it, neither workers nor what ran before, so a
training that was killed at step 300 goes on at step 300 with the batches it would have had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.augment import Augment
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.seeding import derive_seed

B = TypeVar("B")
T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """U unlabeled images of side S, each put to one place and shown there twice. Of their masks nothing is known."""

    weak: NDArray[np.uint8]
    """(U, S, S, 3) RGB, colours and sharpness as they are."""
    strong: NDArray[np.uint8]
    """(U, S, S, 3) RGB, colours and sharpness changed; where asked for, with rectangles of one another."""
    valid: NDArray[np.bool_]
    """(U, S, S), pixels of `weak` that lie inside the image."""
    source: NDArray[np.int64]
    """(U, S, S), number of the weak view that shows, at the same place, what `strong` shows; -1: outside an image."""


@dataclass(frozen=True)
class Batch:
    """B training images of side S."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    masks: NDArray[np.uint8]
    """(B, S, S) class ids, 255 = ignore."""
    weights: NDArray[np.float32]
    """(B,), or (B, S, S) where an image holds a piece of another one of other weight."""
    pseudo: NDArray[np.bool_] | None = None
    """(B,), which images have pseudo masks; None: none of them."""
    views: Views | None = None
    """Unlabeled images beside them; None: none."""


@dataclass(frozen=True)
class LabelBatch:
    """B training images of side S with a diagnosis each."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    labels: NDArray[np.float32]
    """(B,), 1 where the image holds a lesion, else 0."""


class _Stream(ABC, Generic[B]):
    """Batches by step, read ahead; `keys` are what all draws are derived from."""

    keys: tuple[int | str, ...]

    @abstractmethod
    def __getitem__(self, step: int) -> B:
        """The batch of `step` (0, 1, ...)."""

    def _draw(self, items: Sequence[T], name: str, step: int, count: int) -> list[T]:
        """The `count` items of `step`: the items are gone through in shuffled epochs."""
        first = step * count
        return [self._nth(items, name, n) for n in range(first, first + count)]

    def _nth(self, items: Sequence[T], name: str, n: int) -> T:
        epoch, place = divmod(n, len(items))
        order = np.random.default_rng(derive_seed(*self.keys, name, epoch)).permutation(len(items))
        return items[order[place]]

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[B]:
        """Batches of steps [start, stop) in order, read ahead by `num_workers` processes (0: one thread)."""
        if num_workers == 0:
            yield from self._stream_thread(start, stop)
            return
        from torch.utils.data import DataLoader

        yield from DataLoader(
            self,  # type: ignore[arg-type]  # map-style by protocol: __getitem__ is all the loader needs
            sampler=range(start, stop),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_is,
        )

    def _stream_thread(self, start: int, stop: int) -> Iterator[B]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kmine-batches") as executor:
            ahead = executor.submit(self.__getitem__, start) if start < stop else None
            for step in range(start, stop):
                current, ahead = ahead, executor.submit(self.__getitem__, step + 1) if step + 1 < stop else None
                yield current.result()


class Batches(_Stream[Batch]):
    """Labeled and pseudo-labeled images mixed in a fixed share.

    `self[step]` is the batch of that step. Each pool is gone through in shuffled epochs, so that every image is seen
    equally often. Two exceptions among the pseudo-labeled images: those of weight 0 are left out, and those known to
    be empty get no more places than `max_empty_share` of them (in a single batch, that share rounded up) unless all
    are empty.

    Args:
        labeled: images with given masks, each of weight 1.
        pseudo: images with pseudo masks, or None.
        augment: of the labeled images.
        pseudo_augment: of the pseudo-labeled ones; default: the same.
        batch_size: B, at least 2.
        labeled_share: of each batch, rounded, at least one image; all of it where there are no pseudo masks.
        max_empty_share: see above, [0, 1].
        cutmix: probability of each image to get a rectangle of another one of its batch, see `cutmix`.
        seed, round_idx: what all draws are derived from.
    """

    def __init__(
        self,
        labeled: Pool,
        pseudo: Pool | None,
        augment: Augment,
        *,
        pseudo_augment: Augment | None = None,
        batch_size: int,
        labeled_share: float,
        max_empty_share: float = 1.0,
        cutmix: float = 0.0,
        seed: int,
        round_idx: int,
    ) -> None:
        self.labeled = labeled
        self.pseudo = pseudo
        self.augment = augment
        self.pseudo_augment = pseudo_augment or augment
        self.cutmix = cutmix
        self.keys = (seed, round_idx)
        counted = [i for i in pseudo.ids if pseudo.weight(i) > 0] if pseudo is not None else []
        self._empty = [i for i in counted if i in pseudo.empty]
        self._full = [i for i in counted if i not in pseudo.empty]
        self.num_pseudo = batch_size - max(1, round(labeled_share * batch_size)) if counted else 0
        self.num_labeled = batch_size - self.num_pseudo
        self._empty_rate = Fraction(0)
        """Places for empty masks in a batch, on average."""
        if self._empty:
            share = Fraction(len(self._empty), len(counted))
            most = Fraction(max_empty_share).limit_denominator(1000) if self._full else 1
            self._empty_rate = self.num_pseudo * min(share, most)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...)."""
        labeled_ids = self._draw(self.labeled.ids, "labeled", step, self.num_labeled)
        pseudo = self._draw_pseudo(step)
        pairs = [self._read(self.labeled, self.augment, i, step, slot) for slot, i in enumerate(labeled_ids)]
        pairs += [
            self._read(self.pseudo, self.pseudo_augment, i, step, slot)
            for slot, i in enumerate(pseudo, len(labeled_ids))
        ]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        weights = np.array([1.0] * len(labeled_ids) + [self.pseudo.weight(i) for i in pseudo], np.float32)
        batch = Batch(images, masks, weights, np.arange(len(pairs)) >= len(labeled_ids))
        return cutmix(batch, self.cutmix, (*self.keys, step, "cutmix")) if self.cutmix else batch

    def _draw_pseudo(self, step: int) -> list[str]:
        """The pseudo-labeled images of `step`, those known to be empty last."""
        before, after = int(step * self._empty_rate), int((step + 1) * self._empty_rate)
        full = range(step * self.num_pseudo - before, (step + 1) * self.num_pseudo - after)
        drawn = [self._nth(self._full, "pseudo", n) for n in full]
        return drawn + [self._nth(self._empty, "empty", n) for n in range(before, after)]

    def _read(
        self, pool: Pool, augment: Augment, sample_id: str, step: int, slot: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        seed = derive_seed(*self.keys, step, slot, sample_id)
        return augment(pool.image_resized(sample_id), pool.mask_resized(sample_id), seed)


class ViewBatches(Batches):
    """Labeled images and, where `Batches` has pseudo-labeled ones, unlabeled ones in two views; no mask is asked for.

    As many are labeled as there, and they are the same ones; the unlabeled ones are gone through in shuffled epochs.

    Args:
        labeled: images with given masks.
        unlabeled: images; a pool that withholds masks will do.
        augment: of the labeled images.
        strong: of the unlabeled ones' strong view; the weak view shares its changes of place.
        batch_size, labeled_share, cutmix, seed, round_idx: as in `Batches`; `cutmix` mixes labeled images.
        view_cutmix: probability of each strong view to get a rectangle of another one.

    Raises:
        UserError: the share leaves no place for unlabeled images, or there are none.
    """

    def __init__(
        self,
        labeled: Pool,
        unlabeled: Pool,
        augment: Augment,
        *,
        strong: Augment,
        batch_size: int,
        labeled_share: float,
        cutmix: float = 0.0,
        view_cutmix: float = 0.0,
        seed: int,
        round_idx: int,
    ) -> None:
        self.num_unlabeled = places_for_unlabeled(unlabeled, batch_size, labeled_share)
        num_labeled = batch_size - self.num_unlabeled
        mixing = cutmix if num_labeled > 1 else 0.0  # one image alone has nobody to mix with
        how = {"batch_size": num_labeled, "labeled_share": 1.0, "seed": seed, "round_idx": round_idx}
        super().__init__(labeled, None, augment, cutmix=mixing, **how)
        self.unlabeled = unlabeled
        self.weak = Augment(strong.size, strong.enabled, geometric_only=True)
        self.strong = strong
        self.view_cutmix = view_cutmix if self.num_unlabeled > 1 else 0.0

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...)."""
        return replace(super().__getitem__(step), views=self._views(step))

    def _views(self, step: int) -> Views:
        drawn = self._draw(self.unlabeled.ids, "unlabeled", step, self.num_unlabeled)
        pairs = [self._two_views(i, step, slot) for slot, i in enumerate(drawn, self.num_labeled)]
        weak, strong, valid = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        source = np.where(valid, np.arange(len(drawn))[:, None, None], -1)
        keys = (*self.keys, step, "cutmix of views")
        mixed = cutmix(Batch(strong, source, np.ones(len(drawn), np.float32)), self.view_cutmix, keys)
        return Views(weak, mixed.images, valid, mixed.masks)

    def _two_views(self, sample_id: str, step: int, slot: int) -> tuple[NDArray[np.uint8], ...]:
        """Both views of an image, and which of its pixels lie inside it."""
        image, seed = self.unlabeled.image_resized(sample_id), derive_seed(*self.keys, step, slot, sample_id)
        blank = np.zeros(image.shape[:2], np.uint8)
        weak, outside = self.weak(image, blank, seed)
        return weak, self.strong(image, blank, seed)[0], outside == 0


def places_for_unlabeled(unlabeled: Pool, batch_size: int, labeled_share: float) -> int:
    """How many images of a batch are unlabeled ones; `UserError` where that is none."""
    places = batch_size - max(1, round(labeled_share * batch_size))
    if not len(unlabeled):
        raise UserError("expected unlabeled images to learn from, got none; label fewer, or train on the labels alone")
    if not places:
        raise UserError(
            f"fit.labeled_share: expected a share that leaves unlabeled images a place in a batch of {batch_size}, got "
            f"{labeled_share}; lower it, or enlarge fit.batch_size"
        )
    return places


def cutmix(batch: Batch, probability: float, keys: tuple[int | str, ...]) -> Batch:
    """CutMix: an image of the batch gets a rectangle of another one, in its place, with its mask and its weight.

    After UniMatch (arXiv 2208.09910), as we read it: the rectangle covers 2 to 40 % of the image, its sides differ by a
    factor of up to 3.3. Labeled and pseudo-labeled images mix with one another. Rectangles are taken from the images as
    they came, so the order of the images plays no part.

    Args:
        batch: at least 2 images of one weight each; left unchanged.
        probability: of each image to get a rectangle.
        keys: with the image's place in the batch they decide all.
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
    """Rows and columns of a rectangle inside a square of `size`."""
    area, shape = rng.uniform(0.02, 0.4), np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
    sides = [min(size, max(1, round(size * np.sqrt(area * s)))) for s in (shape, 1 / shape)]
    corner = [int(rng.integers(size - side + 1)) for side in sides]
    return slice(corner[0], corner[0] + sides[0]), slice(corner[1], corner[1] + sides[1])


class LabelBatches(_Stream[LabelBatch]):
    """Images with their image-level labels; no mask is ever asked for, so pools that withhold masks serve as well.

    Half of every batch are images with a lesion (of an odd number, the smaller half), whatever their share in the
    pools: lesions are rare, and small batches drawn as they come would often hold none. The classifier's probabilities
    are therefore those of a world in which every second image has a lesion; their order, and with it the AUC, is not
    touched. (Ours.)

    A lesion close to the border may be moved out of the image by `augment`: its label is then wrong for that step.
    """

    def __init__(
        self, pools: Sequence[Pool], augment: Augment, *, batch_size: int, seed: int, shuffle: bool = False
    ) -> None:
        """Take every image of `pools` that has a label; `shuffle` deals the labels out anew, as a control.

        Raises:
            UserError: no image with a lesion is among them, or none without.
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
        self.num_positive = batch_size // 2
        self.num_negative = batch_size - self.num_positive
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


def _as_is(batch: B) -> B:
    return batch
