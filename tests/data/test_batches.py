"""Batches are a function of (seed, round, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kmine.data.augment import Augment
from kmine.data.batches import (
    Batch,
    Batches,
    BatchPlan,
    LabelBatches,
    ViewBatches,
    cutmix,
)
from kmine.errors import UserError, WithheldMaskError


class FakePool:
    """Images whose every pixel is the sample's number."""

    def __init__(self, first: int, count: int, mask: int, weights=(), empty=()) -> None:
        self.ids = tuple(str(first + n) for n in range(count))
        self.mask = mask
        self.weights = dict(weights)
        self.empty = frozenset(empty)

    def __len__(self) -> int:
        return len(self.ids)

    def image_resized(self, sample_id: str) -> np.ndarray:
        return np.full((8, 8, 3), int(sample_id), np.uint8)

    def mask_resized(self, sample_id: str) -> np.ndarray:
        return np.full((8, 8), 0 if sample_id in self.empty else self.mask, np.uint8)

    def weight(self, sample_id: str) -> float:
        return self.weights.get(sample_id, 1.0)


def batches(
    num_labeled=5, num_pseudo=7, seed=0, round_idx=1, share=0.5, batch_size=4, weights=(), empty=(), **more
) -> Batches:
    pseudo = FakePool(100, num_pseudo, 2, weights, empty) if num_pseudo else None
    plan = BatchPlan(seed, round_idx, batch_size, Augment(8, enabled=False), labeled_share=share, **more)
    return Batches(FakePool(1, num_labeled, 1), pseudo, plan)


def numbers(batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_each_batch_holds_the_fixed_share_with_the_masks_of_its_pool():
    for step in range(20):
        batch = batches()[step]
        assert batch.images.shape == (4, 8, 8, 3) and batch.masks.shape == (4, 8, 8)
        assert [n < 100 for n in numbers(batch)] == [True, True, False, False]
        assert batch.masks[:, 0, 0].tolist() == [1, 1, 2, 2]
        assert batch.weights.tolist() == [1, 1, 1, 1]
        assert batch.pseudo.tolist() == [False, False, True, True]


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


def test_a_pseudo_mask_carries_its_weight_and_a_given_one_counts_as_one():
    for step in range(10):
        batch = batches(weights={"100": 0.25, "103": 0.5}, share=0.25)[step]
        expected = [1.0, *({100: 0.25, 103: 0.5}.get(n, 1.0) for n in numbers(batch)[1:])]
        assert batch.weights.tolist() == expected and batch.weights.dtype == np.float32


def test_an_image_of_weight_0_is_as_good_as_absent():
    """Not even through batch norm may it say anything."""
    silent = batches(num_pseudo=8, weights={"107": 0.0})
    for step in range(20):
        assert numbers(silent[step]) == numbers(batches(num_pseudo=7)[step])
    alone = batches(num_pseudo=1, weights={"100": 0.0})
    assert alone.num_labeled == 4 and not alone[0].pseudo.any()


EMPTY = tuple(str(n) for n in range(101, 113))
"""Twelve of thirteen pseudo masks."""


def num_empty(batch) -> int:
    return sum(str(n) in EMPTY for n in numbers(batch))


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.4, 2), (1.0, 4)])
def test_empty_masks_get_no_more_than_their_share_of_the_places(share, most):
    made = batches(num_pseudo=13, batch_size=8, empty=EMPTY, max_empty_share=share)
    counts = [num_empty(made[step]) for step in range(50)]
    assert max(counts) <= most
    assert sum(counts) == int(50 * 4 * min(share, 12 / 13))
    assert all(len(numbers(made[step])) == 8 and made[step].pseudo.sum() == 4 for step in range(3))


def test_a_share_of_less_than_one_place_is_kept_over_the_steps():
    made = batches(num_pseudo=13, batch_size=4, empty=EMPTY, max_empty_share=0.25)
    assert [num_empty(made[step]) for step in range(8)] == [0, 1] * 4


def test_few_empty_masks_are_seen_as_often_as_any_other():
    made = batches(num_pseudo=10, batch_size=8, empty=("100", "101"), max_empty_share=0.25)
    seen = Counter(n for step in range(25) for n in numbers(made[step]) if n >= 100)
    assert len(seen) == 10 and set(seen.values()) == {10}


def test_where_all_masks_are_empty_they_get_all_the_places():
    made = batches(num_pseudo=5, empty=[str(n) for n in range(100, 105)], max_empty_share=0.0)
    assert all(made[step].pseudo.sum() == 2 for step in range(5))


def test_without_empty_masks_the_share_changes_nothing():
    for step in range(12):
        a, b = batches()[step], batches(max_empty_share=0.0)[step]
        assert np.array_equal(a.images, b.images)


def test_rationed_and_mixed_batches_are_a_function_of_the_step_too():
    how = {"num_pseudo": 13, "batch_size": 8, "empty": EMPTY, "max_empty_share": 0.3, "cutmix": 0.7}
    whole = list(batches(**how).stream(0, 9, 0))
    for other in (batches(**how).stream(4, 9, 0), batches(**how).stream(4, 9, 2)):
        for x, y in zip(whole[4:], other, strict=True):
            assert np.array_equal(x.images, y.images) and np.array_equal(x.masks, y.masks)
            assert np.array_equal(x.weights, y.weights)


class Grey:
    """An augmentation that paints an image with one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, image, mask, seed):
        return np.full_like(image, self.value), mask


def test_pseudo_labeled_images_alone_get_the_strong_view():
    made = batches(strong=Grey(77))
    for step in range(5):
        assert [n == 77 for n in numbers(made[step])] == [False, False, True, True]


# -- CutMix


def coded(weights=(1.0, 1.0, 1.0)) -> Batch:
    """Three images whose every pixel tells image and place; the mask says the same, 255 in a corner."""
    places = np.arange(400, dtype=np.uint16).reshape(20, 20) % 250
    images = np.stack([np.stack([places, np.full_like(places, n), places], axis=-1) for n in range(3)]).astype(np.uint8)
    masks = np.repeat(np.arange(3, dtype=np.uint8)[:, None, None], 20, 1).repeat(20, 2)
    masks[:, :4, :4] = 255
    return Batch(images, masks, np.array(weights, np.float32), np.array([False, True, True]))


def test_every_pixel_keeps_its_place_its_class_and_its_weight():
    mixed_ones = 0
    for key in range(40):
        before = coded((1.0, 0.5, 0.25))
        batch = cutmix(before, 0.6, (key,))
        came_from = batch.images[..., 1]
        corner = np.zeros((3, 20, 20), bool)
        corner[:, :4, :4] = True
        assert np.array_equal(batch.images[..., 0], before.images[..., 0]), "a pixel stays in its place"
        assert np.array_equal(batch.masks, np.where(corner, 255, came_from)), "255 travels like any class"
        assert np.array_equal(batch.weights, np.array([1.0, 0.5, 0.25], np.float32)[came_from])
        assert batch.pseudo is before.pseudo
        mixed_ones += sum((came_from[n] != n).any() for n in range(3))
    assert 0.45 < mixed_ones / 120 < 0.75


def test_what_is_pasted_is_one_rectangle_of_one_other_image_of_2_to_40_percent():
    shares, sides = [], []
    for key in range(60):
        came_from = cutmix(coded(), 1.0, (key,)).images[..., 1]
        for n in range(3):
            foreign = came_from[n] != n
            rows, cols = np.flatnonzero(foreign.any(axis=1)), np.flatnonzero(foreign.any(axis=0))
            assert foreign[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all(), "a full rectangle"
            assert foreign.sum() == len(rows) * len(cols) and len(set(came_from[n][foreign])) == 1
            shares.append(foreign.mean())
            sides.append((rows[0], cols[0], rows[-1], cols[-1]))
    assert min(shares) >= 0.01 and max(shares) <= 0.45 and max(shares) - min(shares) > 0.2
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    assert low[:2].tolist() == [0, 0] and high[2:].tolist() == [19, 19], "it reaches every border"


def test_cutmix_off_is_the_batch_itself_and_equal_weights_stay_one_number_an_image():
    before = coded()
    off = cutmix(before, 0.0, (0,))
    assert np.array_equal(off.images, before.images) and np.array_equal(off.masks, before.masks)
    on = cutmix(before, 1.0, (0,))
    assert on.weights.shape == (3,) and not np.array_equal(on.images, before.images)
    assert np.array_equal(before.images, coded().images), "the batch that came in is left alone"
    for step in range(5):
        assert np.array_equal(batches(cutmix=0.0)[step].images, batches()[step].images)


def test_labels_alone_are_mixed_with_labels_alone():
    made = batches(num_pseudo=0, cutmix=1.0)
    for step in range(5):
        batch = made[step]
        assert set(np.unique(batch.images)) <= set(range(1, 6)) and (batch.masks == 1).all()
    assert any(len(np.unique(made[step].images[0])) == 2 for step in range(5))


def test_labeled_and_pseudo_labeled_images_mix_with_one_another():
    made = batches(cutmix=1.0)
    pairs = {
        (slot < 2, other < 100)
        for step in range(30)
        for slot, image in enumerate(made[step].images)
        for other in set(np.unique(image)) - {np.uint8(numbers(batches()[step])[slot])}
    }
    assert pairs == {(a, b) for a in (True, False) for b in (True, False)}


class LabeledPool(FakePool):
    """Images of even number are lesion-free, those that 5 divides of unknown label; a mask must not be asked for."""

    def image_label(self, sample_id: str) -> int | None:
        return None if int(sample_id) % 5 == 0 else int(sample_id) % 2

    def mask_resized(self, sample_id: str) -> np.ndarray:
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


# -- unlabeled images in two views


class ClosedPool(FakePool):
    """Images of noise around their number; their masks are nobody's."""

    def image_resized(self, sample_id: str) -> np.ndarray:
        noise = np.random.default_rng(int(sample_id)).integers(0, 30, (32, 32, 3))
        return (int(sample_id) + noise).astype(np.uint8)

    def mask_resized(self, sample_id: str) -> np.ndarray:
        raise WithheldMaskError(sample_id)


class OpenPool(ClosedPool):
    def mask_resized(self, sample_id: str) -> np.ndarray:
        return np.ones((32, 32), np.uint8)


def view_batches(seed=0, round_idx=1, batch_size=6, share=0.5, enabled=True, num_unlabeled=7, **more) -> ViewBatches:
    augment, strong = Augment(32, enabled), Augment(32, enabled, strong=enabled)
    plan = BatchPlan(seed, round_idx, batch_size, augment, strong, labeled_share=share, **more)
    return ViewBatches(OpenPool(1, 5, 1), ClosedPool(100, num_unlabeled, 0), plan)


def same_views(a: Batch, b: Batch) -> bool:
    names = ("weak", "strong", "valid", "source")
    return all(np.array_equal(getattr(a.views, name), getattr(b.views, name)) for name in names)


def test_beside_unlabeled_images_stand_the_labeled_ones_that_stand_beside_pseudo_labeled_ones():
    plan = BatchPlan(0, 1, 6, Augment(32), labeled_share=0.5)
    mixed = Batches(OpenPool(1, 5, 1), OpenPool(100, 7, 0), plan)
    for step in range(4):
        seen, ours = view_batches()[step], mixed[step]
        assert np.array_equal(seen.images, ours.images[:3]) and np.array_equal(seen.masks, ours.masks[:3])
        assert len(seen.weights) == 3 and not seen.pseudo.any()
        assert seen.views.weak.shape == seen.views.strong.shape == (3, 32, 32, 3)


def test_both_views_show_one_place_and_what_lies_outside_is_known_by_neither():
    drawn = [view_batches()[step].views for step in range(6)]
    assert any((views.weak != views.strong).any() for views in drawn)
    assert any(not views.valid.all() for views in drawn)
    for views in drawn:
        own = np.arange(3)[:, None, None]
        assert np.array_equal(views.source, np.where(views.valid, own, -1))
    views = view_batches(enabled=False)[0].views
    assert np.array_equal(views.weak, views.strong) and views.valid.all()


def test_a_mixed_strong_view_says_which_weak_view_shows_its_pixels():
    views = view_batches(enabled=False, view_cutmix=1.0)[0].views
    assert all(len(np.unique(source)) == 2 for source in views.source)
    rows, columns = np.indices((32, 32))
    for strong, source in zip(views.strong, views.source, strict=True):
        assert np.array_equal(strong, views.weak[source, rows, columns])
    assert view_batches(batch_size=2, view_cutmix=1.0, cutmix=1.0)[0].views.source.max() == 0, "nobody to mix with"


def test_views_are_a_function_of_seed_round_and_step():
    made = {"view_cutmix": 0.5}
    whole = list(view_batches(**made).stream(0, 6, 0))
    assert all(map(same_views, view_batches(**made).stream(3, 6, 2), whole[3:]))
    for other in ({"seed": 1}, {"round_idx": 2}):
        assert not same_views(view_batches(**made, **other)[0], whole[0])


def test_every_unlabeled_image_is_seen_equally_often():
    made = view_batches(enabled=False)
    seen = Counter(views.weak[n].tobytes() for step in range(14) for views in [made[step].views] for n in range(3))
    assert sorted(seen.values()) == [6] * 7


@pytest.mark.parametrize(("changed", "said"), [({"share": 1.0}, "fit.labeled_share"), ({"num_unlabeled": 0}, "none")])
def test_a_batch_without_room_for_unlabeled_images_is_refused(changed, said):
    with pytest.raises(UserError, match=said):
        view_batches(**changed)
