"""Kvasir-SEG by hand: every layout that works, and one clear error for everything that does not."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kmine.config import DataConfig
from kmine.data import open_source, source
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds kvasir_seg/")


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


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


def test_reads_pairs_from_either_folder(root):
    for folder in (root, root.parent):
        source = KvasirSeg(folder)
        assert [(ref.sample_id, ref.has_mask) for ref in source.refs()] == [("a", True), ("b", True)]
        assert source.skipped == ()
        assert source.image("a").shape == (40, 50, 3) and source.image("a").dtype == np.uint8
    assert source.class_names == ("background", "polyp")


def test_jpeg_ringing_does_not_reach_the_mask(root):
    stored = np.array(Image.open(root / "masks/a.jpg").convert("L"))
    assert len(np.unique(stored)) > 2
    np.testing.assert_array_equal(KvasirSeg(root).mask("a"), mask_array()[..., 0] // 255)


def test_threshold_is_above_127(root):
    values = np.zeros((40, 50), np.uint8)
    values[0, :3] = (127, 128, 255)
    (root / "masks/a.jpg").unlink()
    save(root / "masks/a.png", values)
    assert KvasirSeg(root).mask("a")[0, :4].tolist() == [0, 1, 1, 0]


def test_suffixes_may_differ_in_case_and_kind(root):
    save(root / "images/c.PNG", image_array())
    save(root / "masks/c.JPEG", mask_array())
    assert [ref.sample_id for ref in KvasirSeg(root).refs()] == ["a", "b", "c"]


def test_image_without_mask_can_only_be_unlabeled(root):
    (root / "masks/b.jpg").unlink()
    source = KvasirSeg(root)
    assert [ref.has_mask for ref in source.refs()] == [True, False]
    with pytest.raises(SampleError, match="expected a mask of the same name"):
        source.mask("b")


def test_masks_without_images_are_named_or_listed(root):
    for i in range(7):
        save(root / "masks" / f"lost{i}.jpg", mask_array())
    with pytest.raises(UserError, match=r"lost0.jpg.*lost4.jpg and 2 more.*--data.on_error skip"):
        KvasirSeg(root)
    source = KvasirSeg(root, "skip")
    assert [skipped.sample_id for skipped in source.skipped] == [f"lost{i}" for i in range(7)]
    assert len(source.refs()) == 2


def test_hidden_files_are_ignored_and_foreign_ones_listed(root):
    (root / "images/._a.jpg").write_bytes(b"resource fork")
    (root / "images/notes.txt").write_text("hello")
    source = KvasirSeg(root)
    assert len(source.refs()) == 2
    assert [Path(skipped.path).name for skipped in source.skipped] == ["notes.txt"]


def test_two_files_of_one_name(root):
    save(root / "images/a.png", image_array())
    with pytest.raises(UserError, match=r"found a\.jpg and a\.png"):
        KvasirSeg(root, "skip")


def test_layout_errors(tmp_path, root):
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


def test_unreadable_folder(root, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        KvasirSeg(root)


def damage_image(path: Path, kind: str) -> None:
    path.unlink()
    path = path.with_suffix(".png")
    rgb = image_array()
    match kind:
        case "empty":
            path.touch()
        case "foreign":
            path.write_text("<html>404</html>")
        case "16-bit":
            save(path, rgb[..., 0].astype(np.uint16) * 256)
        case "16-bit colour":
            import cv2

            cv2.imwrite(str(path), rgb.astype(np.uint16) * 256)
        case "rgba":
            save(path, np.dstack([rgb, rgb[..., :1]]))
        case "palette alpha":
            Image.fromarray(rgb).quantize(16).save(path, transparency=0)
        case "grey":
            save(path, rgb[..., 0])
        case "truncated png":
            save(path, rgb)
            path.write_bytes(path.read_bytes()[:-1500])
        case "truncated jpeg":
            save(path.with_suffix(".jpg"), rgb)
            path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:-200])
        case "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6
            save(path.with_suffix(".jpg"), rgb, exif=exif)
        case "cmyk":
            Image.fromarray(rgb).convert("CMYK").save(path.with_suffix(".jpg"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("empty", r"empty file \(0 bytes\)"),
        ("foreign", "something else or a destroyed header"),
        ("16-bit", "got 16 or more"),
        ("16-bit colour", "got 16 or more"),
        ("rgba", "RGBA with alpha"),
        ("palette alpha", "P with alpha"),
        ("grey", r"got a grey one \(L\)"),
        ("truncated png", "truncated or damaged"),
        ("truncated jpeg", "truncated or damaged"),
        ("rotated", "EXIF orientation 6"),
        ("cmyk", "mode CMYK"),
    ],
)
def test_unfit_image(root, kind, expected):
    damage_image(root / "images/a.jpg", kind)
    with pytest.raises(SampleError, match=expected) as caught:
        KvasirSeg(root).image("a")
    assert Path(caught.value.path).stem == "a"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whose", [(source, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")])
def test_decompression_bomb(root, monkeypatch, whose):
    monkeypatch.setattr(*whose, 100)
    with pytest.raises(SampleError, match="sane size"):
        KvasirSeg(root).image("a")


def test_vanished_image(root):
    source = KvasirSeg(root)
    (root / "images/a.jpg").unlink()
    with pytest.raises(SampleError, match="found no such file"):
        source.image("a")


def test_palette_without_alpha_is_colour(root):
    (root / "images/a.jpg").unlink()
    Image.fromarray(image_array()).quantize(16).save(root / "images/a.png")
    assert KvasirSeg(root).image("a").shape == (40, 50, 3)


def test_mask_of_another_size(root):
    save(root / "masks/a.jpg", mask_array(40, 60))
    with pytest.raises(SampleError, match=r"50 x 40 .*got 60 x 40"):
        KvasirSeg(root).mask("a")


def test_mask_without_foreground(root):
    save(root / "masks/a.jpg", mask_array() // 255)
    with pytest.raises(SampleError, match=r"store the foreground as 255 \(not 1\)"):
        KvasirSeg(root).mask("a")


def test_transparent_or_truncated_mask(root):
    (root / "masks/a.jpg").write_bytes((root / "masks/a.jpg").read_bytes()[:-200])
    with pytest.raises(SampleError, match="truncated"):
        KvasirSeg(root).mask("a")
    (root / "masks/a.jpg").unlink()
    save(root / "masks/a.png", np.dstack([mask_array(), mask_array()[..., :1]]))
    with pytest.raises(SampleError, match="alpha"):
        KvasirSeg(root).mask("a")


def test_fingerprint_follows_files(root):
    before = KvasirSeg(root).fingerprint()
    assert KvasirSeg(root.parent).fingerprint() == before
    os.utime(root / "masks/a.jpg", ns=(1, 1))
    touched = KvasirSeg(root).fingerprint()
    (root / "masks/a.jpg").unlink()
    assert len({before, touched, KvasirSeg(root).fingerprint()}) == 3


def test_open_source_names(root):
    assert open_source(DataConfig(name="kvasir_seg", root=str(root))).name == "kvasir_seg"
    with pytest.raises(UserError, match=r"--data.root FOLDER \(published at https://"):
        open_source(DataConfig(name="kvasir_seg"))
    with pytest.raises(
        UserError, match=r"'kvasir'; did you mean kvasir_seg\? Known: covid_qu_ex, folder, kvasir_seg, lits, phantom"
    ):
        open_source(DataConfig(name="kvasir"))
    with pytest.raises(UserError, match="'zzz'; Known: covid_qu_ex, folder, kvasir_seg, lits, phantom"):
        open_source(DataConfig(name="zzz"))


# -- images without a polyp


@pytest.fixture
def normals(tmp_path):
    for n, stem in enumerate(("a b", "z")):
        save(tmp_path / "clean" / f"{stem}.png", image_array()[n + 1 :])
    return tmp_path / "clean"


def test_normal_images_join_as_unlabeled_with_their_label(root, normals):
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


def test_normal_images_stay_out_of_validation_and_test(root, normals):
    for stem in "cdefgh":
        save(root / "images" / f"{stem}.jpg", image_array())
        save(root / "masks" / f"{stem}.jpg", mask_array())
    refs = KvasirSeg(root, normal_images=normals).refs()
    splits = make_splits(refs, label_fraction=0.5, val_fraction=0.25, test_fraction=0.25, split_seed=0, seed=0)
    assert {"normal/a b", "normal/z"} < set(splits.unlabeled)
    assert len({safe_name(ref.sample_id) for ref in refs}) == len(refs) == 10


def test_a_normal_image_that_is_among_the_polyps(root, normals):
    save(normals / "b.png", image_array()[3:])
    (normals / "other.jpg").write_bytes((root / "images/a.jpg").read_bytes())
    with pytest.raises(UserError, match=r"b\.png \(as b\.jpg\), other\.jpg \(as [ab]\.jpg\)") as error:
        KvasirSeg(root, "skip", normals)
    assert "\n" not in str(error.value)
    (normals / "b.png").unlink()
    content = bytearray((root / "images/a.jpg").read_bytes())
    content[-3] ^= 1
    (normals / "other.jpg").write_bytes(bytes(content))
    assert len(KvasirSeg(root, "stop", normals).refs()) == 5, "the same size is not the same picture"


def test_the_folder_of_normal_images_is_checked(root, tmp_path):
    with pytest.raises(UserError, match=r"data.normal_images: .*found nothing at"):
        KvasirSeg(root, normal_images=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.normal_images: .*found a file at"):
        KvasirSeg(root, normal_images=tmp_path / "file")
    (tmp_path / "void").mkdir()
    (tmp_path / "void/readme.txt").touch()
    with pytest.raises(
        UserError, match=r"data.normal_images: expected .jpg, .jpeg or .png files in .*void, found none"
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
def test_genuine_pairs():
    source = KvasirSeg(Path(DATA) / "kvasir_seg")
    refs = source.refs()
    assert len(refs) == 300 and all(ref.has_mask for ref in refs) and not source.skipped
    for ref in refs[::60]:
        mask = source.mask(ref.sample_id)
        assert source.image(ref.sample_id).shape == (*mask.shape, 3)
        assert set(np.unique(mask)) == {0, 1}
