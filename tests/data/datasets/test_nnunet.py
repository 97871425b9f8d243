"""nnU-Net's layout as a data set: channels as colours, missing labels, the ignore label, windows."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_files import colour_noise, save_image, save_volume
from helpers.nnunet_files import label, pictures, volume, volumes, write_dataset_json

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.io.windowing import windowed
from kmine.data.source import SliceLocation
from kmine.errors import SampleError, UserError

WINDOW = (-100.0, 400.0)


def opened(root, **settings):
    return open_source(DataConfig(name="nnunet", root=str(root), **settings))


def test_two_channels_are_red_and_green_and_cases_without_label_are_unlabeled(tmp_path):
    source = opened(volumes(tmp_path), window=WINDOW)
    assert [(r.sample_id, r.group_id, r.has_mask, r.split) for r in source.refs()][::3] == [
        ("a/slice-0000", "a", True, None),
        ("b/slice-0000", "b", True, None),
        ("c/slice-0000", "c", False, None),
    ]
    assert source.class_names == ("background", "liver") and source.name == "nnunet"
    image = source.image("b/slice-0001")
    np.testing.assert_array_equal(image[..., 0], windowed(volume(10)[1], WINDOW))
    np.testing.assert_array_equal(image[..., 1], windowed(volume(11)[1], WINDOW))
    assert not image[..., 2].any()
    np.testing.assert_array_equal(source.mask("b/slice-0001"), label()[1])
    assert source.slice_location("b/slice-0001") == SliceLocation("b", tmp_path / "imagesTr/b_0000.nii.gz", 1)
    with pytest.raises(SampleError, match="expected a mask"):
        source.mask("c/slice-0000")


def test_one_chosen_channel_is_grey_and_changes_the_fingerprint(tmp_path):
    root = volumes(tmp_path)
    source = opened(root, window=WINDOW, channels=(1,))
    image = source.image("a/slice-0000")
    np.testing.assert_array_equal(image, np.repeat(windowed(volume(1)[0], WINDOW)[..., None], 3, axis=2))
    prints = {opened(root, window=WINDOW, channels=c).fingerprint() for c in (None, (0,), (1,), (1, 0))}
    assert len(prints) == 4
    (root / "imagesTr/c_0001.nii.gz").touch()
    assert opened(root, window=WINDOW).fingerprint() not in prints


def test_ignored_pixels_become_255(tmp_path):
    source = opened(volumes(tmp_path, ignore=True), window=WINDOW)
    mask = source.mask("a/slice-0002")
    assert mask[0, 0] == 255 and (mask == 255).sum() == 1 and source.class_names == ("background", "liver")


def test_without_a_window_each_channel_has_its_percentiles_but_not_ct(tmp_path):
    source = opened(volumes(tmp_path / "mr"))
    values = volume(0)
    sampled = np.float32(values.transpose(2, 1, 0)[::2, ::2])
    low, high = np.percentile(sampled, (0.5, 99.5))
    np.testing.assert_array_equal(source.image("a/slice-0001")[..., 0], windowed(values[1], (low, high)))
    with pytest.raises(UserError, match=r"data.window: expected the Hounsfield units .*--data.window"):
        opened(volumes(tmp_path / "ct", channels=("CT",)))


def test_a_volume_of_equal_values_is_black(tmp_path):
    root = write_dataset_json(tmp_path, ("T2",))
    for name in "ab":
        save_volume(root / f"imagesTr/{name}_0000.nii.gz", np.full((2, 4, 4), 7, np.int16))
    save_volume(root / "labelsTr/a.nii.gz", np.zeros((2, 4, 4), np.uint8))
    assert not opened(root).image("a/slice-0000").any()


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_pictures_in_colour_and_in_channels_are_the_same(tmp_path, ending):
    colour, grey = (opened(pictures(tmp_path / str(c), 3, colour=c, ending=ending)) for c in (True, False))
    for ref in colour.refs():
        np.testing.assert_array_equal(colour.image(ref.sample_id), grey.image(ref.sample_id))
    assert [ref.has_mask for ref in colour.refs()] == [True, True, False]
    np.testing.assert_array_equal(colour.mask("p0"), (colour.image("p0")[..., 0] > 128).astype(np.uint8))
    one = opened(tmp_path / "True", channels=(2,)).image("p1")
    np.testing.assert_array_equal(one, np.repeat(colour.image("p1")[..., 2:], 3, axis=2))


def test_files_that_do_not_fit_together_are_one_line(tmp_path):
    root = volumes(tmp_path / "v")
    save_volume(root / "imagesTr/a_0001.nii.gz", volume(1)[:2])
    with pytest.raises(SampleError, match="expected the volume's shape"):
        opened(root, window=WINDOW).image("a/slice-0000")
    save_volume(root / "imagesTr/a_0001.nii.gz", volume(1), np.diag([0.7, -0.8, 2.5, 1]))
    with pytest.raises(SampleError, match="expected the axis directions of the first channel"):
        opened(root, window=WINDOW).image("a/slice-0000")
    grey = pictures(tmp_path / "p", 2, colour=False)
    save_image(grey / "imagesTr/p0_0001.png", colour_noise(0, (20, 24)))
    with pytest.raises(SampleError, match="expected one grey channel a file"):
        opened(grey).image("p0")
    with pytest.raises(UserError, match=r"data.root: expected the folder of an nnU-Net data set, got nothing"):
        open_source(DataConfig(name="nnunet"))


def test_channels_in_files_of_their_own_are_named_for_prediction(tmp_path):
    assert opened(volumes(tmp_path / "two")).file_channels == ("T2", "ADC")
    assert opened(tmp_path / "two", channels=(1,)).file_channels == ()
    assert opened(pictures(tmp_path / "colour", 2)).file_channels == ()
