"""Batches: determined by seed, round and step; composition, CutMix, views, image-level labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kmine.data.augment import Augment, crop
from kmine.data.batches import Batch, Batches, BatchPlan, LabelBatches, ViewBatches, cutmix
from kmine.errors import UserError, WithheldMaskError


class FakePool:
    """Images in which every pixel is the number of the sample."""

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

    def blank_mask(self, sample_id: str) -> np.ndarray:
        return np.zeros(self.image_resized(sample_id).shape[:2], np.uint8)

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


def test_batches_have_the_labeled_share_and_the_masks_of_each_pool():
    for step in range(20):
        batch = batches()[step]
        assert batch.images.shape == (4, 8, 8, 3) and batch.masks.shape == (4, 8, 8)
        assert [n < 100 for n in numbers(batch)] == [True, True, False, False]
        assert batch.masks[:, 0, 0].tolist() == [1, 1, 2, 2]
        assert batch.weights.tolist() == [1, 1, 1, 1]
        assert batch.pseudo.tolist() == [False, False, True, True]


@pytest.mark.parametrize("num_pseudo", [0, 7])
def test_every_image_occurs_equally_often(num_pseudo):
    made = batches(num_pseudo=num_pseudo)
    seen = Counter(n for step in range(35) for n in numbers(made[step]))
    for low, high in ((0, 100), (100, 200)):
        counts = [c for n, c in seen.items() if low <= n < high]
        assert not counts or max(counts) - min(counts) <= 1


def test_batches_are_determined_by_seed_round_and_step():
    whole = [numbers(b) for b in batches().stream(0, 12, 0)]
    assert [numbers(b) for b in batches().stream(5, 12, 0)] == whole[5:]
    assert whole != [numbers(b) for b in batches(seed=1).stream(0, 12, 0)]
    assert whole != [numbers(b) for b in batches(round_idx=2).stream(0, 12, 0)]


def test_worker_processes_give_the_same_batches():
    a, b = list(batches().stream(2, 8, 0)), list(batches().stream(2, 8, 2))
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.images, y.images) and np.array_equal(x.masks, y.masks)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_the_parts_that_processes_read_are_together_the_whole_batch(mixing):
    whole, parts = batches(cutmix=mixing)[5], [batches(cutmix=mixing) for _ in range(3)]
    for n, part in enumerate(parts):
        part.own = lambda count, n=n: slice(count * n // 3, count * (n + 1) // 3)
    read = [part[5] for part in parts]
    assert all((one.images.reshape(len(one.images), -1).any(axis=1)).sum() < len(whole.images) for one in read)
    images, masks = (sum(getattr(one, name) for one in read) for name in ("images", "masks"))
    mixed = parts[0].mix(replace(read[0], images=images, masks=masks), 5)
    for name in ("images", "masks", "weights", "pseudo"):
        assert np.array_equal(getattr(mixed, name), getattr(whole, name)), name


def test_an_empty_stream_ends_and_a_small_share_is_one_image():
    assert list(batches().stream(3, 3, 0)) == []
    assert batches(share=0.01, batch_size=8).num_labeled == 1


def test_pseudo_masks_have_their_weights_and_given_ones_weight_1():
    for step in range(10):
        batch = batches(weights={"100": 0.25, "103": 0.5}, share=0.25)[step]
        expected = [1.0, *({100: 0.25, 103: 0.5}.get(n, 1.0) for n in numbers(batch)[1:])]
        assert batch.weights.tolist() == expected and batch.weights.dtype == np.float32


def test_an_image_of_weight_0_is_left_out():
    """Else it would influence batch norm."""
    weightless = batches(num_pseudo=8, weights={"107": 0.0})
    for step in range(20):
        assert numbers(weightless[step]) == numbers(batches(num_pseudo=7)[step])
    labeled_only = batches(num_pseudo=1, weights={"100": 0.0})
    assert labeled_only.num_labeled == 4 and not labeled_only[0].pseudo.any()


EMPTY = tuple(str(n) for n in range(101, 113))
"""Twelve of thirteen pseudo masks."""


def num_empty(batch) -> int:
    return sum(str(n) in EMPTY for n in numbers(batch))


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.4, 2), (1.0, 4)])
def test_empty_masks_get_at_most_their_share_of_the_places(share, most):
    made = batches(num_pseudo=13, batch_size=8, empty=EMPTY, max_empty_share=share)
    counts = [num_empty(made[step]) for step in range(50)]
    assert max(counts) <= most
    assert sum(counts) == int(50 * 4 * min(share, 12 / 13))
    assert all(len(numbers(made[step])) == 8 and made[step].pseudo.sum() == 4 for step in range(3))


def test_a_share_below_one_place_holds_on_average():
    made = batches(num_pseudo=13, batch_size=4, empty=EMPTY, max_empty_share=0.25)
    assert [num_empty(made[step]) for step in range(8)] == [0, 1] * 4


def test_few_empty_masks_occur_as_often_as_others():
    made = batches(num_pseudo=10, batch_size=8, empty=("100", "101"), max_empty_share=0.25)
    seen = Counter(n for step in range(25) for n in numbers(made[step]) if n >= 100)
    assert len(seen) == 10 and set(seen.values()) == {10}


def test_empty_masks_get_all_places_if_all_are_empty():
    made = batches(num_pseudo=5, empty=[str(n) for n in range(100, 105)], max_empty_share=0.0)
    assert all(made[step].pseudo.sum() == 2 for step in range(5))


def test_without_empty_masks_the_share_has_no_effect():
    for step in range(12):
        a, b = batches()[step], batches(max_empty_share=0.0)[step]
        assert np.array_equal(a.images, b.images)


def test_limited_and_mixed_batches_do_not_depend_on_earlier_steps():
    plan = {"num_pseudo": 13, "batch_size": 8, "empty": EMPTY, "max_empty_share": 0.3, "cutmix": 0.7}
    whole = list(batches(**plan).stream(0, 9, 0))
    for other in (batches(**plan).stream(4, 9, 0), batches(**plan).stream(4, 9, 2)):
        for x, y in zip(whole[4:], other, strict=True):
            assert np.array_equal(x.images, y.images) and np.array_equal(x.masks, y.masks)
            assert np.array_equal(x.weights, y.weights)


class Grey:
    """An augmentation that fills an image with one value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, image, mask, seed):
        return np.full_like(image, self.value), mask


def test_only_pseudo_labeled_images_are_augmented_strongly():
    made = batches(strong=Grey(77))
    for step in range(5):
        assert [n == 77 for n in numbers(made[step])] == [False, False, True, True]


# -- CutMix


def coded(weights=(1.0, 1.0, 1.0)) -> Batch:
    """Three images; each pixel encodes image and position, the mask its image, with 255 in a corner."""
    places = np.arange(400, dtype=np.uint16).reshape(20, 20) % 250
    images = np.stack([np.stack([places, np.full_like(places, n), places], axis=-1) for n in range(3)]).astype(np.uint8)
    masks = np.repeat(np.arange(3, dtype=np.uint8)[:, None, None], 20, 1).repeat(20, 2)
    masks[:, :4, :4] = 255
    return Batch(images, masks, np.array(weights, np.float32), np.array([False, True, True]))


def test_every_pixel_keeps_its_position_class_and_weight():
    num_mixed = 0
    for key in range(40):
        before = coded((1.0, 0.5, 0.25))
        batch = cutmix(before, 0.6, (key,))
        origin = batch.images[..., 1]
        corner = np.zeros((3, 20, 20), bool)
        corner[:, :4, :4] = True
        assert np.array_equal(batch.images[..., 0], before.images[..., 0]), "pixels keep their positions"
        assert np.array_equal(batch.masks, np.where(corner, 255, origin)), "255 is pasted like any class"
        assert np.array_equal(batch.weights, np.array([1.0, 0.5, 0.25], np.float32)[origin])
        assert batch.pseudo is before.pseudo
        num_mixed += sum((origin[n] != n).any() for n in range(3))
    assert 0.45 < num_mixed / 120 < 0.75


def test_cutmix_pastes_one_rectangle_of_2_to_40_percent():
    shares, sides = [], []
    for key in range(60):
        origin = cutmix(coded(), 1.0, (key,)).images[..., 1]
        for n in range(3):
            foreign = origin[n] != n
            rows, cols = np.flatnonzero(foreign.any(axis=1)), np.flatnonzero(foreign.any(axis=0))
            assert foreign[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all(), "a full rectangle"
            assert foreign.sum() == len(rows) * len(cols) and len(set(origin[n][foreign])) == 1
            shares.append(foreign.mean())
            sides.append((rows[0], cols[0], rows[-1], cols[-1]))
    assert min(shares) >= 0.01 and max(shares) <= 0.45 and max(shares) - min(shares) > 0.2
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    assert low[:2].tolist() == [0, 0] and high[2:].tolist() == [19, 19], "rectangles reach every border"


def test_cutmix_off_is_the_identity_and_equal_weights_stay_scalar():
    before = coded()
    off = cutmix(before, 0.0, (0,))
    assert np.array_equal(off.images, before.images) and np.array_equal(off.masks, before.masks)
    on = cutmix(before, 1.0, (0,))
    assert on.weights.shape == (3,) and not np.array_equal(on.images, before.images)
    assert np.array_equal(before.images, coded().images), "the input is not modified"
    for step in range(5):
        assert np.array_equal(batches(cutmix=0.0)[step].images, batches()[step].images)


def test_without_pseudo_masks_labeled_images_are_mixed():
    made = batches(num_pseudo=0, cutmix=1.0)
    for step in range(5):
        batch = made[step]
        assert set(np.unique(batch.images)) <= set(range(1, 6)) and (batch.masks == 1).all()
    assert any(len(np.unique(made[step].images[0])) == 2 for step in range(5))


def test_labeled_and_pseudo_labeled_images_are_mixed():
    made = batches(cutmix=1.0)
    pairs = {
        (slot < 2, other < 100)
        for step in range(30)
        for slot, image in enumerate(made[step].images)
        for other in set(np.unique(image)) - {np.uint8(numbers(batches()[step])[slot])}
    }
    assert pairs == {(a, b) for a in (True, False) for b in (True, False)}


class LabeledPool(FakePool):
    """Even numbers are lesion-free, multiples of 5 have no label; masks must not be read."""

    def image_label(self, sample_id: str) -> int | None:
        return None if int(sample_id) % 5 == 0 else int(sample_id) % 2

    def mask_resized(self, sample_id: str) -> np.ndarray:
        raise AssertionError("a mask was read")


def label_batches(seed=0, batch_size=4) -> LabelBatches:
    pools = [LabeledPool(1, 4, 0), LabeledPool(100, 13, 0)]
    return LabelBatches(pools, Augment(8, enabled=False), batch_size=batch_size, seed=seed)


@pytest.mark.parametrize(("batch_size", "expected"), [(4, [1, 1, 0, 0]), (5, [1, 1, 0, 0, 0])])
def test_label_batches_are_balanced_and_read_no_mask(batch_size, expected):
    for step in range(10):
        batch = label_batches(batch_size=batch_size)[step]
        assert batch.images.shape == (batch_size, 8, 8, 3) and batch.labels.dtype == np.float32
        assert batch.labels.tolist() == expected == [n % 2 for n in numbers(batch)]


def test_images_of_one_label_occur_equally_often():
    made = label_batches()
    seen = Counter(n for step in range(24) for n in numbers(made[step]))
    assert set(seen) == {n for n in (*range(1, 5), *range(100, 113)) if n % 5}
    for label in (0, 1):
        counts = [c for n, c in seen.items() if n % 2 == label]
        assert max(counts) - min(counts) <= 1


def test_label_batches_are_determined_by_seed_and_step():
    whole = [numbers(b) for b in label_batches().stream(0, 8, 0)]
    assert [numbers(b) for b in label_batches().stream(3, 8, 2)] == whole[3:]
    assert whole != [numbers(b) for b in label_batches(seed=1).stream(0, 8, 0)]


def test_images_of_one_label_only_are_refused():
    with pytest.raises(UserError, match="got 1 with, 0 without and 1 of unknown label; a classifier needs both"):
        pool = LabeledPool(1, 5, 0)
        pool.ids = ("1", "5")
        LabelBatches([pool], Augment(8, enabled=False), batch_size=4, seed=0)


# -- unlabeled images in two views


class ClosedPool(FakePool):
    """Images of noise around their number, without masks."""

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


def test_labeled_images_are_those_of_batches_with_pseudo_masks():
    plan = BatchPlan(0, 1, 6, Augment(32), labeled_share=0.5)
    mixed = Batches(OpenPool(1, 5, 1), OpenPool(100, 7, 0), plan)
    for step in range(4):
        with_views, with_pseudo = view_batches()[step], mixed[step]
        assert np.array_equal(with_views.images, with_pseudo.images[:3])
        assert np.array_equal(with_views.masks, with_pseudo.masks[:3])
        assert len(with_views.weights) == 3 and not with_views.pseudo.any()
        assert with_views.views.weak.shape == with_views.views.strong.shape == (3, 32, 32, 3)


def test_both_views_have_the_same_geometry_and_valid_pixels():
    drawn = [view_batches()[step].views for step in range(6)]
    assert any((views.weak != views.strong).any() for views in drawn)
    assert any(not views.valid.all() for views in drawn)
    for views in drawn:
        own = np.arange(3)[:, None, None]
        assert np.array_equal(views.source, np.where(views.valid, own, -1))
    views = view_batches(enabled=False)[0].views
    assert np.array_equal(views.weak, views.strong) and views.valid.all()


def test_source_gives_the_weak_view_of_each_strong_pixel():
    views = view_batches(enabled=False, view_cutmix=1.0)[0].views
    assert all(len(np.unique(source)) == 2 for source in views.source)
    rows, columns = np.indices((32, 32))
    for strong, source in zip(views.strong, views.source, strict=True):
        assert np.array_equal(strong, views.weak[source, rows, columns])
    assert view_batches(batch_size=2, view_cutmix=1.0, cutmix=1.0)[0].views.source.max() == 0, (
        "one image cannot be mixed"
    )


def test_two_strong_views_differ_in_colours_and_rectangles_and_share_the_geometry():
    one, two = (view_batches(num_strong=n, view_cutmix=0.5)[1].views for n in (1, 2))
    for name in ("weak", "valid"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    for name in ("strong", "source"):
        first, second = np.split(getattr(two, name), 2)
        assert np.array_equal(first, getattr(one, name)), "the first view is that of one view"
        assert (first != second).any()
    plain = view_batches(num_strong=2)
    assert all((a != b).any() for step in range(3) for a, b in zip(*np.split(plain[step].views.strong, 2), strict=True))
    unchanged = view_batches(num_strong=2, enabled=False, view_cutmix=1.0)[0].views
    rows, columns = np.indices((32, 32))
    for strong, source in zip(unchanged.strong, unchanged.source, strict=True):
        assert np.array_equal(strong, unchanged.weak[source, rows, columns]), "every pixel stays in its place"


def test_views_are_determined_by_seed_round_and_step():
    made = {"view_cutmix": 0.5, "num_strong": 2}
    whole = list(view_batches(**made).stream(0, 6, 0))
    assert all(map(same_views, view_batches(**made).stream(3, 6, 2), whole[3:]))
    for other in ({"seed": 1}, {"round_idx": 2}):
        assert not same_views(view_batches(**made, **other)[0], whole[0])


def test_every_unlabeled_image_occurs_equally_often():
    made = view_batches(enabled=False)
    seen = Counter(views.weak[n].tobytes() for step in range(14) for views in [made[step].views] for n in range(3))
    assert sorted(seen.values()) == [6] * 7


@pytest.mark.parametrize(
    ("changed", "problem"), [({"share": 1.0}, "fit.labeled_share"), ({"num_unlabeled": 0}, "none")]
)
def test_a_batch_without_unlabeled_images_is_refused(changed, problem):
    with pytest.raises(UserError, match=problem):
        view_batches(**changed)


# -- patches


def test_patches_are_parts_of_the_image_and_half_of_them_show_the_object():
    image = np.arange(40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[37, 2], mask[0] = 1, 255
    places = set()
    for seed in range(200):
        part, of_mask = crop(image, mask, 8, seed)
        assert part.shape == (8, 8, 3) and of_mask.shape == (8, 8)
        (place,) = [
            (row, col)
            for row, col in np.ndindex(33, 33)
            if np.array_equal(image[row : row + 8, col : col + 8], part)
            and np.array_equal(mask[row : row + 8, col : col + 8], of_mask)
        ][:1]
        places.add(place)
    shown = [(crop(image, mask, 8, seed)[1] == 1).any() for seed in range(200)]
    assert 0.4 < np.mean(shown) < 0.65 and len(places) > 60
    assert crop(image, mask, None, 0)[0] is image and crop(image, mask, 40, 0)[0] is image
    again = [crop(image, mask, 8, 5) for _ in range(2)]
    assert np.array_equal(again[0][0], again[1][0])


def test_batches_of_patches_have_their_size_in_all_views():
    augment = Augment(16, False)
    plan = BatchPlan(0, 1, 6, augment, labeled_share=0.5, patch=16)
    batch = ViewBatches(OpenPool(1, 5, 1), ClosedPool(100, 7, 0), plan)[0]
    assert batch.images.shape == (3, 16, 16, 3) and batch.masks.shape == (3, 16, 16)
    assert batch.views.weak.shape == batch.views.strong.shape == (3, 16, 16, 3)
