"""Pools give access to images and withhold masks; other masks, weights and corrections by sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.memory_source import MemorySource

from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool, spaced_images
from kmine.errors import UserError, WithheldMaskError
from kmine.types import slice_id

IDS = tuple(f"s{i:02}" for i in (7, 1, 4, 2, 9, 0, 3))
GROUPS = dict.fromkeys(IDS, "g")
MINED = np.full((20, 30), 255, np.uint8)
MINED[:, :15] = 1


class SpacedSource(MemorySource):
    """Ten images; the spacing of all but `unknown_spacing` is known."""

    def __init__(self, unknown_spacing: str = "") -> None:
        mask = np.zeros((20, 30), np.uint8)
        mask[:10] = 1
        images = {f"s{i:02}": np.full((20, 30, 3), i, np.uint8) for i in range(10)}
        super().__init__(images, dict.fromkeys(images, mask), image_labels={i: int(i[1:]) % 2 for i in images})
        self.unknown_spacing = unknown_spacing

    def refs(self):
        return tuple(
            ref if ref.sample_id == self.unknown_spacing else replace(ref, spacing=(1.0, 2.0)) for ref in super().refs()
        )


@pytest.fixture
def source() -> SpacedSource:
    return SpacedSource()


@pytest.fixture
def cache(source, tmp_path) -> SampleCache:
    return SampleCache(source, 32, tmp_path, "stop")


def test_withheld_masks_are_never_read(cache, source):
    pool = Pool(cache, IDS, GROUPS)
    assert pool.ids == IDS and len(pool) == 7
    assert all(pool.sample(sample_id).mask is None for sample_id in IDS)
    assert pool.image_resized("s07").shape == (32, 32, 3)
    assert pool.native_shape("s07") == (20, 30)
    with pytest.raises(WithheldMaskError, match="s07"):
        pool.mask_resized("s07")
    assert not any(read.startswith("mask") for read in source.reads)


def test_a_clean_image_is_known_by_its_mask(tmp_path):
    empty, lesion, ignored = np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8), np.full((8, 8), 255, np.uint8)
    masks = {"a": empty, "b": lesion, "c": ignored, "d": empty}
    images = {i: np.zeros((8, 8, 3), np.uint8) for i in masks}
    pool = Pool(SampleCache(MemorySource(images, masks), 8, tmp_path, "stop"), masks, {i: i for i in masks}, "true")
    assert [pool.is_clean(i) for i in masks] == [True, False, True, True]


def test_image_labels_are_known_where_masks_are_withheld(cache):
    pool = Pool(cache, IDS, GROUPS)
    assert [pool.image_label(i) for i in IDS] == [int(i[1:]) % 2 for i in IDS]
    with pytest.raises(KeyError, match="not in this pool"):
        pool.image_label("s05")


def test_distances_are_in_mm_only_where_every_spacing_is_known(tmp_path):
    groups = {"s00": "a", "s01": "b", "s02": "c"}
    cache = SampleCache(SpacedSource(unknown_spacing="s00"), 32, tmp_path, "stop")
    assert Pool(cache, ("s01", "s02"), groups).in_mm
    assert not Pool(cache, ("s00", "s01"), groups).in_mm


def test_true_masks_are_given_with_the_sample(cache):
    pool = Pool(cache, IDS, GROUPS, "true")
    sample = pool.sample("s07")
    assert sample.mask.shape == (20, 30) and sample.mask.sum() == 300
    assert (sample.group_id, sample.image_label, sample.spacing) == ("g", 1, (1.0, 2.0))
    assert pool.mask_resized("s07")[0, 0] == 1


def test_masks_of_a_reader_replace_the_true_ones(cache, source):
    pool = Pool(cache, IDS, GROUPS, lambda sample_id: MINED)
    assert set(np.unique(pool.mask_resized("s01"))) == {1, 255}
    np.testing.assert_array_equal(pool.sample("s01").mask, MINED)
    assert not any(read.startswith("mask") for read in source.reads)
    with pytest.raises(ValueError, match="expected a mask of"):
        Pool(cache, IDS, GROUPS, lambda sample_id: MINED[:5]).mask_resized("s01")


def test_corrected_masks_take_precedence_for_their_samples(cache):
    pool = Pool(cache, IDS, GROUPS, "true", corrected={"s01": lambda sample_id: MINED, "other": lambda sample_id: None})
    for view in (pool, pool.subset(["s01", "s07"])):
        np.testing.assert_array_equal(view.sample("s01").mask, MINED)
        assert set(np.unique(view.mask_resized("s01"))) == {1, 255}
        assert view.sample("s07").mask.sum() == 300


def test_weights_and_empty_masks_are_kept_for_the_samples_of_the_pool(cache):
    mined = Pool(cache, IDS, GROUPS).with_masks(
        ["s01", "s04", "s02"],
        lambda sample_id: np.zeros((20, 30), np.uint8),
        weights={"s04": 0.5, "s09": 0.1},
        empty={"s02", "s00"},
    )
    assert [mined.weight(i) for i in mined.ids] == [1.0, 0.5, 1.0]
    assert (mined.weights, mined.empty) == ({"s04": 0.5}, {"s02"})
    part = mined.subset(["s04"])
    assert (part.weights, part.empty) == ({"s04": 0.5}, frozenset())
    with pytest.raises(KeyError, match="not in this pool"):
        mined.weight("s09")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"s01: expected a weight in \[0, 1\]"):
            Pool(cache, IDS, GROUPS).with_masks(["s01"], lambda sample_id: MINED, weights={"s01": wrong})


def test_a_pool_may_be_empty_but_lacks_no_sample(cache):
    empty = Pool(cache, (), {})
    assert (len(empty), empty.ids) == (0, ())
    with pytest.raises(UserError, match=r"1 are missing in the data set, such as gone"):
        Pool(cache, ("s01", "gone"), {"s01": "g", "gone": "g"})
    with pytest.raises(KeyError, match="not in this pool"):
        Pool(cache, IDS, GROUPS).image_resized("s05")


def test_neighbours_are_the_next_slices_of_the_volume_that_the_pool_has(tmp_path):
    names = [*(slice_id("a", n) for n in (4, 8, 12, 20)), slice_id("b", 8), "c/slice-x", "d"]
    source = MemorySource(dict.fromkeys(names, np.zeros((4, 4, 3), np.uint8)), {})
    pool = Pool(SampleCache(source, 4, tmp_path, "stop"), names, dict.fromkeys(names, "g"))
    found = {i: pool.neighbours(i) for i in (*names, "unknown") if pool.neighbours(i)}
    a4, a8, a12, _ = names[:4]
    assert found == {a4: (a8,), a8: (a4, a12), a12: (a8,)}


def test_images_of_several_groups_are_no_volume_whatever_their_names(tmp_path):
    """Single PNG files: a model of one fold may have been trained on the next file."""
    names = [slice_id("a", n) for n in range(4)]
    source = MemorySource(dict.fromkeys(names, np.zeros((4, 4, 3), np.uint8)), {})
    cache = SampleCache(source, 4, tmp_path, "stop")
    single, paired = (
        Pool(cache, names, {i: i for i in names}),
        Pool(cache, names, dict(zip(names, "xxyy", strict=True))),
    )
    assert not any(single.neighbours(i) or single.volume_of(i) for i in names)
    assert [paired.neighbours(i) for i in names] == [(names[1],), (names[0],), (names[3],), (names[2],)]
    assert paired.volume_of(names[0]) == tuple(names[:2])


def test_spaced_images_are_those_of_all_pools_in_the_order_of_their_ids(cache):
    pools = Pool(cache, IDS[:4], GROUPS), Pool(cache, IDS[4:], GROUPS, "true")
    everything = spaced_images(pools, 100)
    assert everything[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 7, 9]
    assert spaced_images(pools, 3)[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert len(spaced_images(pools, 6)) == 6


def test_a_supersampled_pool_shows_the_same_samples_at_a_multiple_of_the_size(cache, source):
    pool = Pool(cache, IDS, GROUPS, weights={IDS[0]: 0.5}).with_masks(IDS[:3], lambda _: MINED, empty=IDS[:1])
    finer = pool.supersampled(2)
    assert finer.ids == pool.ids and finer.empty == pool.empty and pool.supersampled(1) is pool
    assert finer.image_resized(IDS[1]).shape == (64, 64, 3) and pool.image_resized(IDS[1]).shape == (32, 32, 3)
    mask = finer.mask_resized(IDS[1])
    assert (mask[:, :31] == 1).all() and (mask[:, 33:] == 255).all()
    with pytest.raises(WithheldMaskError):
        Pool(cache, IDS, GROUPS).supersampled(2).mask_resized(IDS[0])
