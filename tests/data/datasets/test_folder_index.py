"""A user's folders: files by name and kind, pairs of image and mask, one error for each layout that does not fit."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import colour_noise, save_dicom, save_image, save_volume, square

from kmine.data.datasets.folder_index import Item, file_kind, mismatch, pair_folders, split_suffix
from kmine.errors import UserError
from kmine.io.files import safe_name


@pytest.fixture
def pairs(tmp_path) -> Path:
    """a and sub/b have masks, c has none."""
    for n, name in enumerate(("a", "sub/b", "c")):
        save_image(tmp_path / "images" / f"{name}.png", colour_noise(n))
    save_image(tmp_path / "masks/a.png", square())
    save_image(tmp_path / "masks/sub/b.tif", square(1))
    return tmp_path


def paired(root: Path, masks="masks", on_error="stop"):
    return pair_folders(root / "images", root / masks if masks else None, on_error)


def test_files_are_paired_by_name_and_images_without_masks_kept(pairs):
    items, skipped = paired(pairs)
    images, masks = pairs / "images", pairs / "masks"
    assert items == [
        Item("a", images / "a.png", masks / "a.png"),
        Item("c", images / "c.png", None),
        Item("sub/b", images / "sub/b.png", masks / "sub/b.tif"),
    ]
    assert skipped == () and {item.kind for item in items} == {"picture"}
    (pairs / "none").mkdir()
    for folder in (None, "none"):
        assert [item.mask for item in paired(pairs, folder)[0]] == [None] * 3


def test_names_with_spaces_dots_and_umlauts_are_paired(tmp_path):
    names = ("Müller 1/scan.v2", "日本/x y", "a.b/c")
    for name in names:
        save_image(tmp_path / "images" / f"{unicodedata.normalize('NFD', name)}.PNG", colour_noise())
        save_image(tmp_path / "masks" / f"{unicodedata.normalize('NFC', name)}.png", square())
    items, _ = paired(tmp_path)
    assert [item.name for item in items] == sorted(names) and all(item.mask for item in items)
    assert len({safe_name(name) for name in names}) == 3


def test_masks_inside_the_folder_of_images_are_no_images(tmp_path):
    save_image(tmp_path / "images/a.png", colour_noise())
    save_image(tmp_path / "images/masks/a.png", square())
    items, _ = paired(tmp_path, "images/masks")
    assert [(item.name, item.mask is not None) for item in items] == [("a", True)]


def test_masks_without_images_stop_or_are_listed(pairs):
    for n in range(7):
        save_image(pairs / "masks" / f"lost{n}.png", square())
    with pytest.raises(UserError, match=r"lost0\.png.*and 2 more; .*--data.on_error skip"):
        paired(pairs)
    items, skipped = paired(pairs, on_error="skip")
    assert [s.sample_id for s in skipped] == [f"lost{n}" for n in range(7)] and len(items) == 3


def test_hidden_files_are_ignored_and_foreign_ones_listed(pairs):
    (pairs / "images/._a.png").write_bytes(b"fork")
    (pairs / "images/sub/notes.txt").write_text("x")
    items, skipped = paired(pairs)
    assert len(items) == 3 and [s.sample_id for s in skipped] == ["sub/notes.txt"]


def test_layouts_that_do_not_fit_are_one_error(pairs):
    with pytest.raises(UserError, match=r"data.masks: expected a folder, found nothing at .*nowhere"):
        paired(pairs, "nowhere")
    with pytest.raises(UserError, match=r"data.masks: expected another folder"):
        paired(pairs, "images")
    save_image(pairs / "images/a.jpg", colour_noise())
    with pytest.raises(UserError, match=r"one file a name, found a\.jpg and a\.png"):
        paired(pairs, on_error="skip")
    (pairs / "images/a.jpg").unlink()
    save_image(pairs / "other/a_mask.png", square())
    with pytest.raises(
        UserError,
        match=r"images such as a\.png, masks such as a_mask\.png; pass --data.mask_suffix _mask, .*--data.csv",
    ):
        paired(pairs, "other")
    save_volume(pairs / "volumes/a.nii", np.zeros((2, 8, 10), np.uint8))
    with pytest.raises(UserError, match=r"expected a picture .* as mask of a\.png, got a\.nii; convert"):
        paired(pairs, "volumes")
    (pairs / "void").mkdir()
    with pytest.raises(UserError, match=r"data.images: expected PNG.* found none"):
        pair_folders(pairs / "void", None, "stop")


def test_masks_of_an_unknown_format_are_named(pairs):
    (pairs / "arrays").mkdir()
    np.save(pairs / "arrays/a.npy", square())
    with pytest.raises(UserError, match=r"data.masks: .*found 1 others, such as .*a.npy \(a NumPy array\); convert"):
        paired(pairs, "arrays")
    with pytest.raises(UserError, match=r"data.images: .*found 1 others, such as .*a.npy"):
        pair_folders(pairs / "arrays", None, "stop")


def test_kinds_are_known_by_suffix_and_dicom_by_its_first_bytes(tmp_path):
    assert split_suffix("a/scan.1.NII.GZ") == ("a/scan.1", "nifti")
    assert split_suffix("notes.txt") == ("notes.txt", None)
    for name in ("IM0001", "1.2.840.7"):
        assert file_kind(save_dicom(tmp_path / name, square())) == "dicom"
    assert file_kind(save_dicom(tmp_path / "DICOMDIR", square())) is None
    (tmp_path / "README").write_text("no image")
    os.mkfifo(tmp_path / "pipe")
    assert file_kind(tmp_path / "README") is file_kind(tmp_path / "pipe") is None
    assert mismatch(Path("a.nii"), Path("a.nii.gz")) is mismatch(Path("a.dcm"), Path("a.png")) is None
