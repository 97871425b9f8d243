"""Batches are a function of (seed, round, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kmine.data.augment import Augment
from kmine.data.batches import Batches, LabelBatches
from kmine.records import UserError


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


class LabeledPool(FakePool):
    """Images of even number are lesion-free, those that 5 divides of unknown label; a mask must not be asked for."""

    def image_label(self, sample_id: str) -> int | None:
        return None if int(sample_id) % 5 == 0 else int(sample_id) % 2

    def mask_small(self, sample_id: str) -> np.ndarray:
        raise AssertionError("a mask was asked for")


def label_batches(seed=0, batch_size=4) -> LabelBatches:
    pools = [LabeledPool(1, 4, 0), LabeledPool(100, 13, 0)]
    return LabelBatches(pools, Augment(8, enabled=False), batch_size=batch_size, seed=seed)


@pytest.mark.parametrize(("batch_size", "expected"), [(4, [1, 1, 0, 0]), (5, [1, 1, 0, 0, 0])])
def test_label_batches_are_balanced_and_never_ask_for_a_mask(batch_size, expected):
    for step in range(10):
        batch = label_batches(batch_size=batch_size)[step]
        assert batch.images.shape == (batch_size, 8, 8, 3) and batch.labels.dtype == np.float32
        assert batch.labels.tolist() == expected == [n % 2 for n in numbers(batch)]


def test_every_labeled_image_of_every_pool_is_seen_equally_often_among_its_like():
    made = label_batches()
    seen = Counter(n for step in range(24) for n in numbers(made[step]))
    assert set(seen) == {n for n in (*range(1, 5), *range(100, 113)) if n % 5}
    for label in (0, 1):
        counts = [c for n, c in seen.items() if n % 2 == label]
        assert max(counts) - min(counts) <= 1


def test_label_batches_are_a_function_of_seed_and_step():
    whole = [numbers(b) for b in label_batches().stream(0, 8, 0)]
    assert [numbers(b) for b in label_batches().stream(3, 8, 2)] == whole[3:]
    assert whole != [numbers(b) for b in label_batches(seed=1).stream(0, 8, 0)]


def test_images_of_one_label_alone_teach_nothing():
    with pytest.raises(UserError, match="got 1 with, 0 without and 1 of unknown label; a classifier needs both"):
        pool = LabeledPool(1, 5, 0)
        pool.ids = ("1", "5")
        LabelBatches([pool], Augment(8, enabled=False), batch_size=4, seed=0)
