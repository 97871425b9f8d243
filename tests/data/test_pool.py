"""Pools grant masks or withhold them, and stream native samples with one chunk ahead."""

import threading

import numpy as np
import pytest

from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.errors import UserError, WithheldMaskError
from kmine.types import SampleRef


class TrapSource:
    """Its masks may be read only when `granted`."""

    name = "trap"
    class_names = ("background", "thing")
    skipped = ()

    def __init__(self, count=10, granted=False):
        self.count, self.granted = count, granted
        self.reading = True
        self.num_read = 0
        self.lock = threading.Lock()

    def refs(self):
        return tuple(
            SampleRef(f"s{i:02}", f"s{i:02}", image_label=i % 2, spacing=(1.0, 2.0)) for i in range(self.count)
        )

    def image(self, sample_id):
        with self.lock:
            self.num_read += 1
        return np.full((20, 30, 3), int(sample_id[1:]), np.uint8)

    def mask(self, sample_id):
        assert self.granted, "a withheld mask was read"
        mask = np.zeros((20, 30), np.uint8)
        mask[:10] = 1
        return mask

    def fingerprint(self):
        return f"{self.count:064}"


IDS = tuple(f"s{i:02}" for i in (7, 1, 4, 2, 9, 0, 3))
GROUPS = dict.fromkeys(IDS, "g")


def pool(tmp_path, masks="withheld", granted=False) -> Pool:
    return Pool(SampleCache(TrapSource(granted=granted), 32, tmp_path, "stop"), IDS, GROUPS, masks)


def test_withheld_masks_are_never_read(tmp_path):
    view = pool(tmp_path)
    assert view.ids == IDS and len(view) == 7
    assert all(view.sample(sample_id).mask is None for sample_id in IDS)
    assert view.image_resized("s07").shape == (32, 32, 3)
    assert view.native_shape("s07") == (20, 30)
    with pytest.raises(WithheldMaskError, match="s07"):
        view.mask_resized("s07")


def test_image_labels_are_known_where_masks_are_withheld(tmp_path):
    view = pool(tmp_path)
    assert [view.image_label(i) for i in IDS] == [int(i[1:]) % 2 for i in IDS]
    with pytest.raises(KeyError, match="not in this pool"):
        view.image_label("s05")


def test_distances_are_in_mm_only_where_every_spacing_is_known(tmp_path):
    class Partly(TrapSource):
        def refs(self):
            return (SampleRef("s00", "s00"), *super().refs()[1:])

    groups = {"s00": "a", "s01": "b", "s02": "c"}
    cache = SampleCache(Partly(), 32, tmp_path, "stop")
    assert Pool(cache, ("s01", "s02"), groups).in_mm
    assert not Pool(cache, ("s00", "s01"), groups).in_mm


def test_true_masks(tmp_path):
    view = pool(tmp_path, "true", granted=True)
    sample = view.sample("s07")
    assert sample.mask.shape == (20, 30) and sample.mask.sum() == 300
    assert (sample.group_id, sample.image_label, sample.spacing) == ("g", 1, (1.0, 2.0))
    assert view.mask_resized("s07")[0, 0] == 1


def test_masks_of_a_reader_keep_ignored_pixels_and_read_no_truth(tmp_path):
    mined = np.full((20, 30), 255, np.uint8)
    mined[:, :15] = 1
    view = pool(tmp_path, lambda sample_id: mined)
    assert set(np.unique(view.mask_resized("s01"))) == {1, 255}
    np.testing.assert_array_equal(view.sample("s01").mask, mined)
    with pytest.raises(ValueError, match="expected a mask of"):
        pool(tmp_path, lambda sample_id: mined[:5]).mask_resized("s01")


def test_weights_and_empty_masks_belong_to_the_samples_that_are_there(tmp_path):
    mined = pool(tmp_path).with_masks(
        ["s01", "s04", "s02"],
        lambda i: np.zeros((20, 30), np.uint8),
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
            pool(tmp_path).with_masks(["s01"], lambda i: None, weights={"s01": wrong})


def test_empty_pool(tmp_path):
    empty = Pool(SampleCache(TrapSource(), 32, tmp_path, "stop"), (), {})
    assert (len(empty), empty.ids) == (0, ())


def test_strangers_are_refused(tmp_path):
    cache = SampleCache(TrapSource(), 32, tmp_path, "stop")
    with pytest.raises(UserError, match=r"1 are missing in the data set, such as gone"):
        Pool(cache, ("s01", "gone"), {"s01": "g", "gone": "g"})
    with pytest.raises(KeyError, match="not in this pool"):
        pool(tmp_path).image_resized("s05")
