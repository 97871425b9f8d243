"""Arrays as a data set: what is written is read back unchanged, unfit arrays are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.api.arrays import ArrayDataset
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (9, 7, 3)).astype(np.uint8)
MASK = RNG.integers(0, 2, (9, 7))


def opened(data: ArrayDataset, folder):
    return open_source(data.write(folder, DataConfig()))


def test_images_masks_groups_and_labels_come_back(tmp_path):
    grey = IMAGE[..., 0]
    data = ArrayDataset([IMAGE, grey], [MASK, None], groups=["a", "b"], image_labels=[1, 0])
    source = opened(data, tmp_path)
    first, second = source.refs()
    assert [(r.group_id, r.has_mask, r.image_label) for r in (first, second)] == [("a", True, 1), ("b", False, 0)]
    assert np.array_equal(source.image(first.sample_id), IMAGE)
    assert np.array_equal(source.image(second.sample_id), np.stack([grey] * 3, axis=2))
    assert np.array_equal(source.mask(first.sample_id), MASK)


def test_several_classes_keep_ids_and_ignored_pixels(tmp_path):
    mask = np.array([[0, 1, 2], [255, 2, 1]])
    source = opened(ArrayDataset([IMAGE[:2, :3]], [mask], class_names=("background", "organ", "lesion")), tmp_path)
    assert source.class_names == ("background", "organ", "lesion")
    assert np.array_equal(source.mask(source.refs()[0].sample_id), mask)


def test_equal_arrays_are_written_once_and_others_refused(tmp_path):
    ArrayDataset([IMAGE], [MASK]).write(tmp_path, DataConfig())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    ArrayDataset([IMAGE], [MASK]).write(tmp_path, DataConfig())
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    with pytest.raises(UserError, match="another data set; choose another out"):
        ArrayDataset([IMAGE], [1 - MASK]).write(tmp_path, DataConfig())


def test_equal_image_labels_of_numpy_and_of_a_list_are_one_data_set(tmp_path):
    for labels in ([1, 0], np.array([1, 0]), np.array([1, 0], np.uint8), np.array([1.0, 0.0]), [True, np.False_]):
        data = ArrayDataset([IMAGE, IMAGE], [MASK, None], image_labels=labels)
        assert [ref.image_label for ref in opened(data, tmp_path).refs()] == [1, 0]


@pytest.mark.parametrize(
    ("images", "masks", "names", "message"),
    [
        ([IMAGE], [], {}, "masks: expected one entry for each of 1 images, got 0"),
        ([IMAGE / 255], [MASK], {}, r"images\[0\]: expected .* got \(9, 7, 3\) of float64"),
        ([IMAGE[..., :2]], [MASK], {}, r"images\[0\]: expected .* got \(9, 7, 2\)"),
        ([IMAGE], [MASK[:5]], {}, r"masks\[0\]: expected \(9, 7\) of integers"),
        ([IMAGE], [MASK * 255], {}, r"masks\[0\]: expected class ids 0 to 1, got 255"),
        ([IMAGE], [MASK * -1], {}, r"got -1"),
        ([IMAGE], [MASK * 3], {"class_names": ("background", "a", "b")}, r"0 to 2 and 255 \(ignored\), got 3"),
        ([IMAGE], [MASK], {"groups": []}, "groups: expected one entry"),
        ([IMAGE], [MASK], {"image_labels": [2]}, r"image_labels\[0\]: expected 0, 1 or None \(unknown\), got 2"),
        ([IMAGE], [MASK], {"image_labels": [np.nan]}, "got nan"),
    ],
)
def test_unfit_arrays_are_named(images, masks, names, message):
    with pytest.raises(UserError, match=message):
        ArrayDataset(images, masks, **names)
