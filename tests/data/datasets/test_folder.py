"""A user's own files as a data set: images, volumes and DICOM series with masks, groups, labels and splits."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import SHAPE, THREE_CLASSES, colour_noise, save_dicom, save_image, save_volume, square
from PIL import Image

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets import folder
from kmine.data.datasets.folder import Folder
from kmine.data.source import SliceLocation
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError


@pytest.fixture
def opened(tmp_path):
    def build(masks: str | None = "masks", **settings) -> Folder:
        masks = str(tmp_path / masks) if masks else None
        return open_source(DataConfig(name="folder", images=str(tmp_path / "images"), masks=masks, **settings))

    return build


@pytest.fixture
def pairs(tmp_path) -> Path:
    """a and sub/b have masks, c has none."""
    for n, name in enumerate(("a", "sub/b", "c")):
        save_image(tmp_path / "images" / f"{name}.png", colour_noise(n))
    save_image(tmp_path / "masks/a.png", square())
    save_image(tmp_path / "masks/sub/b.tif", square(1))
    return tmp_path


@pytest.fixture
def table(tmp_path):
    """Write a table beside the images and open it."""

    def build(*rows: str) -> Folder:
        path = tmp_path / "table.csv"
        path.write_text("\n".join(("image,mask,group,label,split", *rows)) + "\n")
        return open_source(DataConfig(name="folder", csv=str(path)))

    return build


# -- images


def test_images_are_their_own_groups_and_unlabeled_without_a_mask(pairs, opened):
    source = opened()
    assert [(r.sample_id, r.group_id, r.has_mask, r.image_label, r.split) for r in source.refs()] == [
        ("a", "a", True, None, None),
        ("c", "c", False, None, None),
        ("sub/b", "sub/b", True, None, None),
    ]
    assert source.name == "folder" and source.class_names == ("background", "object") and source.skipped == ()
    np.testing.assert_array_equal(source.image("sub/b"), colour_noise(1))
    np.testing.assert_array_equal(source.mask("a"), square(1))
    np.testing.assert_array_equal(source.mask("sub/b"), square(1))
    with pytest.raises(SampleError, match=r"c\.png: expected a mask of the same name, found none"):
        source.mask("c")
    with pytest.raises(KeyError, match="no sample 'unknown'"):
        source.mask("unknown")
    assert [ref.has_mask for ref in opened(masks=None).refs()] == [False] * 3


def test_a_mask_of_another_size_is_refused(pairs, opened):
    save_image(pairs / "masks/a.png", square(shape=(8, 12)))
    with pytest.raises(SampleError, match=r"size 10 x 8 .*got 12 x 8 "):
        opened().mask("a")


def test_settings_that_do_not_fit_are_one_error(tmp_path):
    with pytest.raises(UserError, match=r"data.images: expected the folder .*--data.csv FILE"):
        open_source(DataConfig(name="folder"))
    with pytest.raises(UserError, match="got both; drop one"):
        Folder(DataConfig(images=str(tmp_path), csv="table.csv"))


@pytest.mark.parametrize("names", [("background",), ("a", "b"), ("background", "x", "x"), ("background", "")])
def test_class_names_are_checked(names):
    with pytest.raises(UserError, match=r"data.class_names: expected background and at least one"):
        DataConfig(class_names=names)


def test_the_fingerprint_follows_files_and_settings(pairs, opened):
    seen = [
        opened(**settings).fingerprint()
        for settings in ({}, {"window": (0.0, 9.0)}, {"class_names": THREE_CLASSES}, {"every_nth": 2}, {"masks": None})
    ]
    assert opened(size=64).fingerprint() == seen[0]
    os.utime(pairs / "images/c.png", ns=(1, 1))
    seen.append(opened().fingerprint())
    os.utime(pairs / "masks/a.png", ns=(1, 1))
    seen.append(opened().fingerprint())
    (pairs / "masks/a.png").unlink()
    seen.append(opened().fingerprint())
    assert len(set(seen)) == 8


# -- tables


def test_groups_labels_and_splits_of_a_table_are_used(pairs, table):
    rows = (
        "images/sub/b.png,masks/sub/b.tif,p 1,1,val",
        "images/a.png,masks/a.png,p2,,train",
        "images/c.png,,p2,0,train",
    )
    source = table(*rows)
    assert [(r.sample_id, r.group_id, r.has_mask, r.image_label, r.split) for r in source.refs()] == [
        ("images/a", "p2", True, None, "train"),
        ("images/c", "p2", False, 0, "train"),
        ("images/sub/b", "p 1", True, 1, "val"),
    ]
    np.testing.assert_array_equal(source.mask("images/sub/b"), square(1))
    splits = make_splits(source.refs(), label_fraction=1, val_fraction=0.2, test_fraction=0, split_seed=0, seed=0)
    assert (splits.labeled, splits.unlabeled, splits.val) == (("images/a",), ("images/c",), ("images/sub/b",))
    assert source.fingerprint() != table(*(row.replace("p2", "p3") for row in rows)).fingerprint()


def test_a_mask_with_an_object_contradicts_the_label_0(pairs, table):
    with pytest.raises(SampleError, match=r"a\.png: expected no object in the mask, as the label in data"):
        table("images/a.png,masks/a.png,,0,").mask("images/a")


# -- volumes


def scan(depth=3) -> np.ndarray:
    return np.random.default_rng(5).integers(-400, 400, (depth, *SHAPE)).astype(np.int16)


def test_slices_of_a_volume_are_one_group(tmp_path, opened):
    path = save_volume(tmp_path / "images/p1/ct.nii.gz", scan())
    labels = np.stack([square(0), square(1), square(0)])
    save_volume(tmp_path / "masks/p1/ct.nii", labels)
    source = opened(window=(-100.0, 300.0))
    assert [(r.sample_id, r.group_id, r.has_mask) for r in source.refs()] == [
        (f"p1/ct/slice-000{n}", "p1/ct", True) for n in range(3)
    ]
    assert source.refs()[0].spacing == pytest.approx((0.8, 0.7))
    expected = np.rint((np.clip(scan().astype(float), -100, 300) + 100) * 255 / 400)
    for n in range(3):
        np.testing.assert_array_equal(source.image(f"p1/ct/slice-000{n}")[..., 1], expected[n])
        np.testing.assert_array_equal(source.mask(f"p1/ct/slice-000{n}"), labels[n])
    assert [r.sample_id[-1] for r in opened(window=(0.0, 1.0), every_nth=2).refs()] == ["0", "2"]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image("p1/ct/slice-0001"), source.image("p1/ct/slice-0001"))
    assert source.slice_location("p1/ct/slice-0002") == SliceLocation("p1/ct", path, 2)
    assert source.slice_location("p1/ct/slice-0003") is source.slice_location("p1/ct") is None
    with pytest.raises(KeyError):
        source.image("p1/ct/slice-0003")


def test_a_volume_needs_a_window(tmp_path, opened):
    save_volume(tmp_path / "images/ct.nii.gz", scan())
    problem = r"data.window: .* for ct.nii.gz, got nothing; .*--data.window \[LOW,HIGH\], .* \[-160,240\]"
    with pytest.raises(UserError, match=problem):
        opened(masks=None)


def test_masks_of_volumes_must_fit(tmp_path, opened):
    save_volume(tmp_path / "images/ct.nii", scan())
    settings = {"window": (0.0, 1.0), "class_names": THREE_CLASSES}
    for labels, affine, problem in (
        (np.zeros((4, *SHAPE), np.uint8), None, "shape 10 x 8 x 3, got 10 x 8 x 4"),
        (np.zeros((3, *SHAPE), np.uint8), np.eye(4), "save it with the image's affine"),
        (np.full((3, *SHAPE), 7, np.uint8), None, "values 7; map"),
        (np.full((3, *SHAPE), -1, np.int16), None, "got -1 in slice 0"),
    ):
        save_volume(tmp_path / "masks/ct.nii", labels, affine)
        with pytest.raises(SampleError, match=problem):
            opened(**settings).mask("ct/slice-0000")
    save_volume(tmp_path / "masks/ct.nii", np.full((3, *SHAPE), 255, np.uint8))
    assert opened(window=(0.0, 1.0)).mask("ct/slice-0000").all()


def test_a_damaged_header_stops_or_is_listed(pairs, opened):
    (pairs / "images/bad.nii").write_bytes(b"nothing")
    (pairs / "images/bad2.dcm").write_bytes(b"nothing")
    with pytest.raises(SampleError, match=r"bad.nii: .*--data.on_error skip"):
        opened(window=(0.0, 1.0))
    source = opened(window=(0.0, 1.0), on_error="skip")
    assert [s.sample_id for s in source.skipped] == ["bad", "bad2"] and len(source.refs()) == 3


# -- DICOM


def test_dicom_files_of_a_series_are_one_group(tmp_path, opened):
    for name, series in (("s/1", "1.2"), ("s/2", "1.2"), ("t/1", "1.3")):
        save_dicom(tmp_path / f"images/{name}.dcm", square().astype(np.int16), series, PixelSpacing=[0.5, 0.25])
    save_image(tmp_path / "masks/s/2.png", square())
    source = opened(window=(0.0, 255.0))
    assert [(r.sample_id, r.group_id, r.has_mask, r.spacing) for r in source.refs()] == [
        ("s/1", "1.2", False, (0.5, 0.25)),
        ("s/2", "1.2", True, (0.5, 0.25)),
        ("t/1", "1.3", False, (0.5, 0.25)),
    ]
    np.testing.assert_array_equal(source.mask("s/2"), square(1))
    np.testing.assert_array_equal(source.image("s/2")[..., 0], square())
    assert source.slice_location("s/2") is None, "a DICOM file is no NIfTI volume"
    save_image(tmp_path / "masks/s/2.png", square(shape=(8, 12)))
    with pytest.raises(SampleError, match=r"10 x 8 .*got 12 x 8"):
        source.mask("s/2")


def test_a_series_in_two_splits_is_refused(tmp_path, table):
    for n in (1, 2):
        save_dicom(tmp_path / f"{n}.dcm", square())
    save_image(tmp_path / "m.png", square())
    with pytest.raises(UserError, match=r"group 1.2.3 in one split, got 1 in train and 2 in val"):
        table("1.dcm,m.png,,,train", "2.dcm,m.png,,,val")
    assert {r.group_id for r in table("1.dcm,m.png,x,,train", "2.dcm,m.png,y,,val").refs()} == {"x", "y"}


def test_the_cache_reads_all_kinds(tmp_path, opened):
    save_image(tmp_path / "images/a.jpg", colour_noise())
    save_volume(tmp_path / "images/b.nii", scan())
    save_dicom(tmp_path / "images/c.dcm", square().astype(np.int16))
    save_image(tmp_path / "masks/a.png", square())
    cache = SampleCache(opened(window=(0.0, 200.0)), 32, tmp_path / "cache")
    assert [r.sample_id for r in cache.refs] == ["a", "b/slice-0000", "b/slice-0001", "b/slice-0002", "c"]
    assert cache.decode_masks(["a"]) == () and cache.mask_resized("a").max() == 1


# -- masks with a suffix


def test_masks_with_a_suffix_lie_beside_the_images_or_in_a_folder(tmp_path):
    for n, name in enumerate(("benign/benign (1)", "benign/benign (2)", "x")):
        save_image(tmp_path / "all" / f"{name}.jpg", colour_noise(n))
    left, right = square(), square()
    left[:, 5:], right[:, :5] = 0, 0
    save_image(tmp_path / "all/benign/benign (1)_mask.png", left)
    save_image(tmp_path / "all/benign/benign (1)_mask_1.png", right)
    save_image(tmp_path / "all/benign/benign (2)_mask.png", square())
    mixed = str(tmp_path / "all")
    for masks in (None, mixed):
        source = open_source(DataConfig(name="folder", images=mixed, masks=masks, mask_suffix="_mask"))
        refs = [(ref.sample_id, ref.has_mask) for ref in source.refs()]
        assert refs == [("benign/benign (1)", True), ("benign/benign (2)", True), ("x", False)]
        np.testing.assert_array_equal(source.mask("benign/benign (1)"), square() // 255)
    with pytest.raises(UserError, match=r"pass --data\.mask_suffix, as in --data\.mask_suffix _mask"):
        open_source(DataConfig(name="folder", images=mixed, masks=mixed))


def test_the_suffix_that_pairs_is_named(tmp_path):
    for n in range(3):
        save_image(tmp_path / "images" / f"ISIC_{n}.jpg", colour_noise(n))
        save_image(tmp_path / "masks" / f"ISIC_{n}_segmentation.png", square())
    folders = {"name": "folder", "images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    with pytest.raises(UserError, match=r"found no pair: .* pass --data\.mask_suffix _segmentation, or pair"):
        open_source(DataConfig(**folders))
    source = open_source(DataConfig(**folders, mask_suffix="_segmentation"))
    assert [(ref.sample_id, ref.has_mask) for ref in source.refs()] == [(f"ISIC_{n}", True) for n in range(3)]
    with pytest.raises(UserError, match=r"expected masks with names that end in '_mask', found none"):
        open_source(DataConfig(**folders, mask_suffix="_mask"))
    save_image(tmp_path / "masks/ISIC_9_segmentation.png", square())
    with pytest.raises(UserError, match=r"found none for .*ISIC_9_segmentation\.png"):
        open_source(DataConfig(**folders, mask_suffix="_segmentation"))


def test_a_suffix_is_no_path_and_no_setting_of_a_table():
    for suffix in ("", " ", "a/b"):
        with pytest.raises(UserError, match=r"data\.mask_suffix: expected the end of the masks' names"):
            DataConfig(mask_suffix=suffix)
    with pytest.raises(UserError, match="got both; drop one"):
        open_source(DataConfig(name="folder", csv="t.csv", mask_suffix="_mask"))


def test_files_that_an_older_version_read_otherwise_have_a_fingerprint_and_a_cache_of_their_own(
    pairs, opened, monkeypatch
):
    def changes(**settings) -> bool:
        now = opened(**settings).fingerprint()
        with monkeypatch.context() as older:
            older.setattr(folder, "READ_ANEW", folder.VERSION)
            return opened(**settings).fingerprint() != now

    three = {"class_names": THREE_CLASSES}
    assert not changes() and not changes(**three)
    for name, colours in (("a", [0, 0, 0, 255, 0, 0, 0, 255, 0]), ("c", [0, 0, 0, 0, 255, 0, 255, 0, 0])):
        mask = Image.fromarray(square(1)).convert("P")
        mask.putpalette(colours)
        mask.save(pairs / f"masks/{name}.png")
    assert changes(**three) and not changes()  # with two classes a colour is no class
    save_dicom(pairs / "images/d.dcm", square().astype(np.int16), "1.2")
    assert changes(window=(0.0, 255.0))
