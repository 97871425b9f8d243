"""Training batches: which images stand in which step, read ahead of the training.

A batch is a function of (seed, round, step) alone. Nothing else decides it, neither workers nor what ran before, so a
training that was killed at step 300 goes on at step 300 with the batches it would have had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.augment import Augment
from kmine.data.pool import Pool
from kmine.records import UserError, derive_seed

B = TypeVar("B")
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """B training images of side S."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    masks: NDArray[np.uint8]
    """(B, S, S) class ids, 255 = ignore."""
    weights: NDArray[np.float32]
    """(B,)."""


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
    equally often.
    """

    def __init__(
        self,
        labeled: Pool,
        pseudo: Pool | None,
        augment: Augment,
        *,
        batch_size: int,
        labeled_share: float,
        seed: int,
        round_idx: int,
    ) -> None:
        self.labeled = labeled
        self.pseudo = pseudo if pseudo is not None and len(pseudo) else None
        self.augment = augment
        self.num_pseudo = batch_size - max(1, round(labeled_share * batch_size)) if self.pseudo else 0
        self.num_labeled = batch_size - self.num_pseudo
        self.keys = (seed, round_idx)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...)."""
        slots = [(self.labeled, i) for i in self._draw(self.labeled.ids, "labeled", step, self.num_labeled)]
        if self.pseudo is not None:
            slots += [(self.pseudo, i) for i in self._draw(self.pseudo.ids, "pseudo", step, self.num_pseudo)]
        pairs = [self._read(pool, sample_id, step, slot) for slot, (pool, sample_id) in enumerate(slots)]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return Batch(images, masks, np.ones(len(pairs), np.float32))

    def _read(self, pool: Pool, sample_id: str, step: int, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        seed = derive_seed(*self.keys, step, slot, sample_id)
        return self.augment(pool.image_small(sample_id), pool.mask_small(sample_id), seed)


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
        found = [(pool, i, pool.image_label(i)) for pool in pools for i in pool.ids]
        if shuffle:
            order = np.random.default_rng(derive_seed(seed, "shuffled image labels")).permutation(len(found))
            found = [(pool, i, found[other][2]) for (pool, i, _), other in zip(found, order, strict=True)]
        self.positive = [(pool, i) for pool, i, label in found if label]
        self.negative = [(pool, i) for pool, i, label in found if label == 0]
        if not self.positive or not self.negative:
            raise UserError(
                "image-level labels: expected training images with a lesion and images without, got "
                f"{len(self.positive)} with, {len(self.negative)} without and "
                f"{sum(label is None for *_, label in found)} of unknown label; a classifier needs both"
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
        image = pool.image_small(sample_id)
        nothing = np.zeros(image.shape[:2], np.uint8)
        return self.augment(image, nothing, derive_seed(*self.keys, step, slot, sample_id))[0]


def _as_is(batch: B) -> B:
    return batch
