"""Kvasir-SEG: pairs by name, layouts, images without a polyp, one error for each misfit."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import save_image as save
from PIL import Image

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds kvasir_seg/")


def image_array(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_array(height: int = 40, width: int = 50) -> np.ndarray:
    mask = np.zeros((height, width, 3), np.uint8)
    mask[10:20, 5:25] = 255
    return mask


@pytest.fixture
def root(tmp_path):
    for stem in ("a", "b"):
        save(tmp_path / "Kvasir-SEG/images" / f"{stem}.jpg", image_array())
        save(tmp_path / "Kvasir-SEG/masks" / f"{stem}.jpg", mask_array())
    return tmp_path / "Kvasir-SEG"


def test_pairs_are_read_from_either_folder(root):
    for folder in (root, root.parent):
        source = KvasirSeg(folder)
        assert [(ref.sample_id, ref.has_mask) for ref in source.refs()] == [("a", True), ("b", True)]
        assert source.skipped == ()
        assert source.image("a").shape == (40, 50, 3) and source.image("a").dtype == np.uint8
    assert source.class_names == ("background", "polyp")


def test_the_folder_is_found_below_the_root_as_kaggle_nests_it(root):
    nested = root.parent / "kaggle/input/kvasirseg/Kvasir-SEG"
    nested.mkdir(parents=True)
    root.rename(nested / "Kvasir-SEG")
    for folder in (nested, nested.parent, nested.parents[1], nested.parents[2]):
        source = KvasirSeg(folder)
        assert source.root == nested / "Kvasir-SEG" and len(source.refs()) == 2
    for leaf in ("images", "masks"):
        save(nested.parent / "CVC-ClinicDB" / leaf / "1.jpg", mask_array())
    assert KvasirSeg(nested.parents[1]).root == nested / "Kvasir-SEG"
    (nested / "Kvasir-SEG").rename(nested / "pairs")
    with pytest.raises(UserError, match=r"expected one folder .* found .*CVC-ClinicDB, .*pairs; pass the one you mean"):
        KvasirSeg(nested.parent)
    assert len(KvasirSeg(nested).refs()) == 2


def test_half_a_layout_above_hides_no_whole_one(root):
    (root.parent / "images").mkdir()
    assert KvasirSeg(root.parent).root == root


def test_compression_noise_of_a_mask_is_removed(root):
    stored = np.array(Image.open(root / "masks/a.jpg").convert("L"))
    assert len(np.unique(stored)) > 2
    np.testing.assert_array_equal(KvasirSeg(root).mask("a"), mask_array()[..., 0] // 255)


def test_suffixes_of_a_pair_may_differ(root):
    save(root / "images/c.PNG", image_array())
    save(root / "masks/c.JPEG", mask_array())
    assert [ref.sample_id for ref in KvasirSeg(root).refs()] == ["a", "b", "c"]


def test_an_image_without_a_mask_is_unlabeled(root):
    (root / "masks/b.jpg").unlink()
    source = KvasirSeg(root)
    assert [ref.has_mask for ref in source.refs()] == [True, False]
    with pytest.raises(SampleError, match="expected a mask of the same name"):
        source.mask("b")


def test_masks_without_images_stop_or_are_listed(root):
    for i in range(7):
        save(root / "masks" / f"lost{i}.jpg", mask_array())
    with pytest.raises(UserError, match=r"lost0.jpg.*lost4.jpg and 2 more.*--data.on_error skip"):
        KvasirSeg(root)
    source = KvasirSeg(root, "skip")
    assert [skipped.sample_id for skipped in source.skipped] == [f"lost{i}" for i in range(7)]
    assert len(source.refs()) == 2


def test_layouts_that_do_not_fit_are_one_error(tmp_path, root):
    with pytest.raises(UserError, match=r"found nothing; pass --data\.root"):
        KvasirSeg(tmp_path / "nowhere")
    (tmp_path / "kvasir-seg.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="got a file; unzip it"):
        KvasirSeg(tmp_path / "kvasir-seg.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found neither"):
        KvasirSeg(tmp_path / "empty")
    (tmp_path / "half/images").mkdir(parents=True)
    with pytest.raises(UserError, match="found only images/"):
        KvasirSeg(tmp_path / "half")
    (tmp_path / "half/masks").mkdir()
    with pytest.raises(UserError, match="found none"):
        KvasirSeg(tmp_path / "half")
    save(tmp_path / "half/images/x.jpg", image_array())
    save(tmp_path / "half/masks/y.jpg", mask_array())
    with pytest.raises(UserError, match="1 images and 1 masks but no pair"):
        KvasirSeg(tmp_path / "half", "skip")


def test_a_mask_of_another_size_is_refused(root):
    save(root / "masks/a.jpg", mask_array(40, 60))
    with pytest.raises(SampleError, match=r"50 x 40 .*got 60 x 40"):
        KvasirSeg(root).mask("a")


def test_a_mask_without_foreground_is_refused(root):
    save(root / "masks/a.jpg", 0 * mask_array())
    with pytest.raises(SampleError, match=r"expected a polyp, got no pixel above 127; store the foreground as 255"):
        KvasirSeg(root).mask("a")


def test_the_fingerprint_follows_files(root):
    before = KvasirSeg(root).fingerprint()
    assert KvasirSeg(root.parent).fingerprint() == before
    os.utime(root / "masks/a.jpg", ns=(1, 1))
    touched = KvasirSeg(root).fingerprint()
    (root / "masks/a.jpg").unlink()
    assert len({before, touched, KvasirSeg(root).fingerprint()}) == 3


# -- images without a polyp


@pytest.fixture
def normals(tmp_path):
    for n, stem in enumerate(("a b", "z")):
        save(tmp_path / "clean" / f"{stem}.png", image_array()[n + 1 :])
    return tmp_path / "clean"


def test_normal_images_are_unlabeled_with_the_label_0(root, normals):
    (root / "masks/b.jpg").unlink()
    source = KvasirSeg(root, normal_images=normals)
    assert [(ref.sample_id, ref.group_id, ref.has_mask, ref.image_label) for ref in source.refs()] == [
        ("a", "a", True, 1),
        ("b", "b", False, 1),
        ("normal/a b", "normal/a b", False, 0),
        ("normal/z", "normal/z", False, 0),
    ]
    np.testing.assert_array_equal(source.image("normal/z"), image_array()[2:])
    with pytest.raises(SampleError, match=r"z\.png: expected a mask"):
        source.mask("normal/z")
    assert [ref.image_label for ref in KvasirSeg(root).refs()] == [None, None]


def test_normal_images_are_not_in_validation_or_test(root, normals):
    for stem in "cdefgh":
        save(root / "images" / f"{stem}.jpg", image_array())
        save(root / "masks" / f"{stem}.jpg", mask_array())
    refs = KvasirSeg(root, normal_images=normals).refs()
    splits = make_splits(refs, label_fraction=0.5, val_fraction=0.25, test_fraction=0.25, split_seed=0, seed=0)
    assert {"normal/a b", "normal/z"} < set(splits.unlabeled)
    assert len({safe_name(ref.sample_id) for ref in refs}) == len(refs) == 10


def test_a_normal_image_that_is_a_copy_of_a_polyp_is_refused(root, normals):
    save(normals / "b.png", image_array()[3:])
    (normals / "other.jpg").write_bytes((root / "images/a.jpg").read_bytes())
    with pytest.raises(UserError, match=r"b\.png \(as b\.jpg\), other\.jpg \(as [ab]\.jpg\)") as error:
        KvasirSeg(root, "skip", normals)
    assert "\n" not in str(error.value)
    (normals / "b.png").unlink()
    content = bytearray((root / "images/a.jpg").read_bytes())
    content[-3] ^= 1
    (normals / "other.jpg").write_bytes(bytes(content))
    assert len(KvasirSeg(root, "stop", normals).refs()) == 5, "the same size, but other bytes"


def test_the_folder_of_normal_images_is_checked(root, tmp_path):
    with pytest.raises(UserError, match=r"data.normal_images: .*found nothing at"):
        KvasirSeg(root, normal_images=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.normal_images: .*found a file at"):
        KvasirSeg(root, normal_images=tmp_path / "file")
    (tmp_path / "void").mkdir()
    (tmp_path / "void/readme.txt").touch()
    with pytest.raises(
        UserError, match=r"data.normal_images: expected .jpg, .jpeg, .png,.* files in .*void, found none"
    ):
        KvasirSeg(root, normal_images=tmp_path / "void")


def test_fingerprint_and_skipped_follow_normal_images(root, normals):
    cfg = DataConfig(name="kvasir_seg", root=str(root), normal_images=str(normals))
    seen = {KvasirSeg(root).fingerprint(), open_source(cfg).fingerprint()}
    os.utime(normals / "z.png", ns=(1, 1))
    seen.add(open_source(cfg).fingerprint())
    (normals / "z.png").unlink()
    seen.add(open_source(cfg).fingerprint())
    assert len(seen) == 4
    (normals / "notes.txt").touch()
    assert [Path(skipped.path).name for skipped in open_source(cfg).skipped] == ["notes.txt"]


@needs_data
def test_real_pairs():
    source = KvasirSeg(Path(DATA) / "kvasir_seg")
    refs = source.refs()
    assert len(refs) == 300 and all(ref.has_mask for ref in refs) and not source.skipped
    for ref in refs[::60]:
        mask = source.mask(ref.sample_id)
        assert source.image(ref.sample_id).shape == (*mask.shape, 3)
        assert set(np.unique(mask)) == {0, 1}
