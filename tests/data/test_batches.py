"""Batches are a function of (seed, round, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kmine.data.augment import Augment
from kmine.data.batches import Batches


class FakePool:
    """Images whose every pixel is the sample's number."""

    def __init__(self, first: int, count: int, mask: int) -> None:
        self.ids = tuple(str(first + n) for n in range(count))
        self.mask = mask

    def __len__(self) -> int:
        return len(self.ids)

    def image_small(self, sample_id: str) -> np.ndarray:
        return np.full((8, 8, 3), int(sample_id), np.uint8)

    def mask_small(self, sample_id: str) -> np.ndarray:
        return np.full((8, 8), self.mask, np.uint8)


def batches(num_labeled=5, num_pseudo=7, seed=0, round_idx=1, share=0.5, batch_size=4) -> Batches:
    pseudo = FakePool(100, num_pseudo, 2) if num_pseudo else None
    plain = Augment(8, enabled=False)
    return Batches(
        FakePool(1, num_labeled, 1),
        pseudo,
        plain,
        batch_size=batch_size,
        labeled_share=share,
        seed=seed,
        round_idx=round_idx,
    )


def numbers(batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_each_batch_holds_the_fixed_share_with_the_masks_of_its_pool():
    for step in range(20):
        batch = batches()[step]
        assert batch.images.shape == (4, 8, 8, 3) and batch.masks.shape == (4, 8, 8)
        assert [n < 100 for n in numbers(batch)] == [True, True, False, False]
        assert batch.masks[:, 0, 0].tolist() == [1, 1, 2, 2]
        assert batch.weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("num_pseudo", [0, 7])
def test_every_image_is_seen_equally_often(num_pseudo):
    made = batches(num_pseudo=num_pseudo)
    seen = Counter(n for step in range(35) for n in numbers(made[step]))
    for low, high in ((0, 100), (100, 200)):
        counts = [c for n, c in seen.items() if low <= n < high]
        assert not counts or max(counts) - min(counts) <= 1


def test_seed_round_and_step_decide_and_nothing_else():
    whole = [numbers(b) for b in batches().stream(0, 12, 0)]
    assert [numbers(b) for b in batches().stream(5, 12, 0)] == whole[5:]
    assert whole != [numbers(b) for b in batches(seed=1).stream(0, 12, 0)]
    assert whole != [numbers(b) for b in batches(round_idx=2).stream(0, 12, 0)]


def test_worker_processes_change_nothing():
    a, b = list(batches().stream(2, 8, 0)), list(batches().stream(2, 8, 2))
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.images, y.images) and np.array_equal(x.masks, y.masks)


def test_an_empty_stream_ends_at_once_and_a_small_share_keeps_one_labeled_image():
    assert list(batches().stream(3, 3, 0)) == []
    assert batches(share=0.01, batch_size=8).num_labeled == 1
