"""Training batches: which images stand in which step, read ahead of the training.

A batch is a function of (seed, round, step) alone. Nothing else decides it, neither workers nor what ran before, so a
training that was killed at step 300 goes on at step 300 with the batches it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kmine.data.augment import Augment
from kmine.data.pool import Pool
from kmine.records import derive_seed


@dataclass(frozen=True)
class Batch:
    """B training images of side S."""

    images: NDArray[np.uint8]
    """(B, S, S, 3) RGB."""
    masks: NDArray[np.uint8]
    """(B, S, S) class ids, 255 = ignore."""
    weights: NDArray[np.float32]
    """(B,)."""


class Batches:
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
        slots = [(self.labeled, i) for i in self._draw(self.labeled, "labeled", step, self.num_labeled)]
        if self.pseudo is not None:
            slots += [(self.pseudo, i) for i in self._draw(self.pseudo, "pseudo", step, self.num_pseudo)]
        pairs = [self._read(pool, sample_id, step, slot) for slot, (pool, sample_id) in enumerate(slots)]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return Batch(images, masks, np.ones(len(pairs), np.float32))

    def _draw(self, pool: Pool, name: str, step: int, count: int) -> list[str]:
        first = step * count
        return [self._nth(pool, name, n) for n in range(first, first + count)]

    def _nth(self, pool: Pool, name: str, n: int) -> str:
        epoch, place = divmod(n, len(pool))
        order = np.random.default_rng(derive_seed(*self.keys, name, epoch)).permutation(len(pool))
        return pool.ids[order[place]]

    def _read(self, pool: Pool, sample_id: str, step: int, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        seed = derive_seed(*self.keys, step, slot, sample_id)
        return self.augment(pool.image_small(sample_id), pool.mask_small(sample_id), seed)

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[Batch]:
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

    def _stream_thread(self, start: int, stop: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kmine-batches") as executor:
            ahead = executor.submit(self.__getitem__, start) if start < stop else None
            for step in range(start, stop):
                current, ahead = ahead, executor.submit(self.__getitem__, step + 1) if step + 1 < stop else None
                yield current.result()


def _as_is(batch: Batch) -> Batch:
    return batch
