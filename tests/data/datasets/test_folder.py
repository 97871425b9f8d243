"""Your own files by hand: pairs, tables, windows and classes that work, and one clear error for what does not."""

from __future__ import annotations

import csv
import os
import pickle
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.folder import Folder
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

SHAPE = (8, 10)
THREE = ("background", "liver", "tumour")


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def picture(seed=0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def square(value=255, shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[2:5, 3:7] = value
    return mask


def save_volume(path: Path, slices: np.ndarray, affine=None) -> Path:
    """(D, H, W), stored along left, back and up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.7, -0.8, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(slices.transpose(2, 1, 0), affine), path)
    return path


def save_dicom(path: Path, values: np.ndarray, series="1.2.3", **tags) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = series
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1 if values.ndim == 2 else 3
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def opened(tmp_path):
    def build(masks="masks", **settings) -> Folder:
        masks = str(tmp_path / masks) if masks else None
        return open_source(DataConfig(name="folder", images=str(tmp_path / "images"), masks=masks, **settings))

    return build


@pytest.fixture
def pairs(tmp_path):
    """a and sub/b have masks, c has none."""
    for n, name in enumerate(("a", "sub/b", "c")):
        save(tmp_path / "images" / f"{name}.png", picture(n))
    save(tmp_path / "masks/a.png", square())
    save(tmp_path / "masks/sub/b.tif", square(1))
    return tmp_path


@pytest.fixture
def table(tmp_path):
    """Write a table beside the images and open it."""

    def build(*rows: str, header="image,mask,group,label,split", encoding="utf-8", **settings) -> Folder:
        path = tmp_path / "table.csv"
        path.write_text("\n".join((header, *rows)) + "\n", encoding)
        return open_source(DataConfig(name="folder", csv=str(path), **settings))

    return build


# -- pairs by name


def test_pairs_by_name_and_images_without_masks_are_unlabeled(pairs, opened):
    source = opened()
    assert [(r.sample_id, r.group_id, r.has_mask, r.image_label, r.split) for r in source.refs()] == [
        ("a", "a", True, None, None),
        ("c", "c", False, None, None),
        ("sub/b", "sub/b", True, None, None),
    ]
    assert source.name == "folder" and source.class_names == ("background", "object") and source.skipped == ()
    np.testing.assert_array_equal(source.image("sub/b"), picture(1))
    np.testing.assert_array_equal(source.mask("a"), square(1))
    np.testing.assert_array_equal(source.mask("sub/b"), square(1))
    with pytest.raises(SampleError, match=r"c\.png: expected a mask of the same name, found none"):
        source.mask("c")
    with pytest.raises(KeyError, match="no sample 'nobody'"):
        source.mask("nobody")


def test_without_masks_all_are_unlabeled(pairs, opened):
    assert [ref.has_mask for ref in opened(masks=None).refs()] == [False] * 3
    (pairs / "none").mkdir()
    assert [ref.has_mask for ref in opened(masks="none").refs()] == [False] * 3


def test_names_with_spaces_dots_and_umlauts(tmp_path, opened):
    names = ("Müller 1/scan.v2", "日本/x y", "a.b/c")
    for n, name in enumerate(names):
        save(tmp_path / "images" / f"{unicodedata.normalize('NFD', name)}.PNG", picture(n))
        save(tmp_path / "masks" / f"{unicodedata.normalize('NFC', name)}.png", square())
    source = opened()
    assert [ref.sample_id for ref in source.refs()] == sorted(names)
    assert all(ref.has_mask for ref in source.refs())
    np.testing.assert_array_equal(source.image(names[1]), picture(1))
    assert len({safe_name(name) for name in names}) == 3


def test_masks_inside_the_folder_of_images_are_no_images(tmp_path):
    save(tmp_path / "images/a.png", picture())
    save(tmp_path / "images/masks/a.png", square())
    source = Folder(DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "images/masks")))
    assert [(ref.sample_id, ref.has_mask) for ref in source.refs()] == [("a", True)]


def test_masks_without_images_stop_or_are_listed(pairs, opened):
    for n in range(7):
        save(pairs / "masks" / f"lost{n}.png", square())
    with pytest.raises(UserError, match=r"lost0\.png.*and 2 more; .*--data.on_error skip"):
        opened()
    source = opened(on_error="skip")
    assert [s.sample_id for s in source.skipped] == [f"lost{n}" for n in range(7)] and len(source.refs()) == 3


def test_hidden_files_are_ignored_and_foreign_ones_listed(pairs, opened):
    (pairs / "images/._a.png").write_bytes(b"fork")
    (pairs / "images/sub/notes.txt").write_text("x")
    source = opened()
    assert len(source.refs()) == 3 and [s.sample_id for s in source.skipped] == ["sub/notes.txt"]


def test_layout_errors(pairs, opened, tmp_path):
    with pytest.raises(UserError, match=r"data.masks: expected a folder, found nothing at .*nowhere"):
        opened(masks="nowhere")
    with pytest.raises(UserError, match=r"data.masks: expected another folder"):
        opened(masks="images")
    save(pairs / "images/a.jpg", picture())
    with pytest.raises(UserError, match=r"one file a name, found a\.jpg and a\.png"):
        opened(on_error="skip")
    (pairs / "images/a.jpg").unlink()
    save(pairs / "other/a_mask.png", square())
    with pytest.raises(UserError, match=r"images such as a\.png, masks such as a_mask\.png; rename .*--data.csv"):
        opened(masks="other")
    save_volume(pairs / "niftis/a.nii", np.zeros((2, *SHAPE), np.uint8))
    with pytest.raises(UserError, match=r"expected a picture .* as mask of a\.png, got a\.nii; convert"):
        opened(masks="niftis")
    with pytest.raises(UserError, match=r"data.images: expected the folder .*--data.csv FILE"):
        open_source(DataConfig(name="folder"))
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"data.images: expected PNG.* found none"):
        Folder(DataConfig(images=str(tmp_path / "void")))
    with pytest.raises(UserError, match="got both; drop one"):
        Folder(DataConfig(images=str(tmp_path), csv="table.csv"))


def test_fingerprint_follows_files_and_settings(pairs, opened):
    seen = [
        opened(**settings).fingerprint()
        for settings in ({}, {"window": (0.0, 9.0)}, {"class_names": THREE}, {"every_nth": 2}, {"masks": None})
    ]
    assert opened(size=64).fingerprint() == seen[0]
    os.utime(pairs / "images/c.png", ns=(1, 1))
    seen.append(opened().fingerprint())
    os.utime(pairs / "masks/a.png", ns=(1, 1))
    seen.append(opened().fingerprint())
    (pairs / "masks/a.png").unlink()
    seen.append(opened().fingerprint())
    assert len(set(seen)) == 8


# -- pictures


def test_grey_and_palette_pictures_are_read_as_rgb(tmp_path, opened):
    save(tmp_path / "images/grey.tif", square(77))
    Image.fromarray(square(1) > 0).save(tmp_path / "images/bits.png")
    source = opened(masks=None)
    np.testing.assert_array_equal(source.image("grey"), np.repeat(square(77)[..., None], 3, 2))
    assert np.unique(source.image("bits")).tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["a.png", "a.tif", "big.tif", "signed.tif", "float.tif"])
def test_deep_grey_goes_through_the_window(tmp_path, opened, kind):
    values = np.array([[0, 100, 150, 200, 300, 400]])
    dtype = {"big.tif": ">u2", "signed.tif": "int32", "float.tif": "float32"}.get(kind, "uint16")
    save(tmp_path / "images" / kind, values.astype(dtype))
    name = kind.split(".")[0]
    # (150 - 100) / 200 * 255 = 63.75; (200 - 100) / 200 * 255 = 127.5, rounded to the even 128
    assert opened(None, window=(100.0, 300.0)).image(name)[0, :, 2].tolist() == [0, 0, 64, 128, 255, 255]
    with pytest.raises(SampleError, match=r"values 0 to 400\); .*--data.window \[LOW,HIGH\]"):
        opened(None).image(name)


def test_deep_grey_in_which_0_is_white(tmp_path, opened):
    path = save(tmp_path / "images/a.tif", np.arange(6, dtype=np.uint16).reshape(1, 6))
    content = path.read_bytes()
    entry = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert content.count(entry + b"\1\0") == 1
    path.write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    with pytest.raises(SampleError, match="got 0 as white; invert it"):
        opened(None, window=(0.0, 5.0)).image("a")


def test_a_window_leaves_8_bits_alone(pairs, opened):
    np.testing.assert_array_equal(opened(window=(0.0, 9.0)).image("a"), picture(0))


def test_unfit_pictures(tmp_path, opened):
    import cv2

    folder = tmp_path / "images"
    save(folder / "alpha.png", np.dstack([picture(), square()]))
    cv2.imwrite(str(folder / "deep.png"), picture().astype(np.uint16) * 256)
    cv2.imwrite(str(folder / "deeptif.tif"), picture().astype(np.uint16) * 256)
    Image.fromarray(picture()).convert("CMYK").save(folder / "cmyk.jpg")
    pages = [Image.fromarray(picture(n)) for n in range(2)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    save(folder / "cut.png", picture())
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-60])
    source = opened(None, window=(0.0, 9.0))
    for name, said in {
        "alpha": "with alpha",
        "deep": "got 16 or more",
        "deeptif": "got 16 or more",
        "cmyk": "mode CMYK",
        "pages": "got several pages",
        "cut": "truncated",
    }.items():
        with pytest.raises(SampleError, match=said):
            source.image(name)


# -- masks


@pytest.fixture
def mask_of(tmp_path, opened):
    """Store one mask and read it."""

    def build(mask: np.ndarray | Image.Image, name="a.png", **settings) -> np.ndarray:
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        save(tmp_path / "images/a.png", picture(shape=(mask.height, mask.width)))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / name)
        return opened(**settings).mask("a")

    return build


@pytest.mark.parametrize("mask", [square(255), square(1), square(1).astype(np.uint16), square(1) > 0])
def test_two_classes_by_255_or_1(mask_of, mask):
    np.testing.assert_array_equal(mask_of(mask), square(1))
    np.testing.assert_array_equal(mask_of(np.zeros(SHAPE, np.uint8)), np.zeros(SHAPE))


def test_beside_1_the_value_255_is_ignored(mask_of):
    mask = square(1)
    mask[0, 0] = 255
    np.testing.assert_array_equal(mask_of(mask), mask)


def test_a_jpeg_is_cut_in_the_middle(mask_of, tmp_path):
    big = np.kron(square(255), np.ones((4, 4), np.uint8))
    grey = np.repeat(big[..., None], 3, axis=2)
    mask = mask_of(grey, "a.jpg")
    assert len(np.unique(np.array(Image.open(tmp_path / "masks/a.jpg").convert("L")))) > 2
    np.testing.assert_array_equal(mask, big // 255)
    with pytest.raises(SampleError, match="JPEG file, which blurs them; store the mask as PNG"):
        mask_of(grey, "a.jpg", class_names=THREE)
    with pytest.raises(SampleError, match=r"got values 0 to [12],.*PNG of 0 and 255"):
        mask_of(big // 255, "a.jpg")
    with pytest.raises(SampleError, match="100% of them in the middle; is this an image"):
        mask_of(np.full(SHAPE, 130, np.uint8), "a.jpg")


def test_many_classes_are_ids(mask_of):
    mask = square(2)
    mask[0] = (0, 1, 2, 255, 0, 0, 0, 0, 0, 0)
    np.testing.assert_array_equal(mask_of(mask, class_names=THREE), mask)
    coloured = Image.fromarray(mask)
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 750 + [255, 255, 255])
    np.testing.assert_array_equal(mask_of(coloured, class_names=THREE), mask)


def test_a_grey_palette_is_read_by_its_greys(mask_of):
    inverted = Image.fromarray(1 - square(1))
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(mask_of(inverted), square(1))


def test_other_values_are_named_with_the_cure(mask_of):
    with pytest.raises(SampleError, match=r"\(0 background, 1 object\), got also the values 38; .*--data.class_names"):
        mask_of(square(38))
    with pytest.raises(SampleError, match=r"2 tumour, and 255 for ignored pixels, got also the values 3; map"):
        mask_of(square(3), class_names=THREE)
    with pytest.raises(SampleError, match=r"values 2, 3, 4, 5, 6, 7 and 72 more"):
        mask_of(np.arange(80, dtype=np.uint8).reshape(8, 10))
    with pytest.raises(SampleError, match=r"values 65535"):
        mask_of(square(1).astype(np.uint16) * 65535)
    with pytest.raises(SampleError, match="expected a grey mask, got colours"):
        mask_of(np.dstack([square(), square(0), square(0)]))


def test_a_mask_of_another_size(pairs, opened):
    save(pairs / "masks/a.png", square(shape=(8, 12)))
    with pytest.raises(SampleError, match=r"size 10 x 8 .*got 12 x 8 "):
        opened().mask("a")


@pytest.mark.parametrize("names", [("background",), ("a", "b"), ("background", "x", "x"), ("background", "")])
def test_class_names_are_checked(names):
    with pytest.raises(UserError, match=r"data.class_names: expected background and at least one"):
        DataConfig(class_names=names)


# -- tables


def test_a_table_says_it_all(pairs, table):
    rows = (
        "images/sub/b.png,masks/sub/b.tif,p 1,1,val",
        "",
        "images/a.png,masks/a.png,p2,,TRAIN",
        "images/c.png,,p2,0,train",
    )
    source = table(*rows, encoding="utf-8-sig")
    assert [(r.sample_id, r.group_id, r.has_mask, r.image_label, r.split) for r in source.refs()] == [
        ("images/a", "p2", True, None, "train"),
        ("images/c", "p2", False, 0, "train"),
        ("images/sub/b", "p 1", True, 1, "val"),
    ]
    np.testing.assert_array_equal(source.mask("images/sub/b"), square(1))
    splits = make_splits(source.refs(), label_fraction=1, val_fraction=0.2, test_fraction=0, split_seed=0, seed=0)
    assert (splits.labeled, splits.unlabeled, splits.val) == (("images/a",), ("images/c",), ("images/sub/b",))
    assert source.fingerprint() != table(*(row.replace("p2", "p3") for row in rows)).fingerprint()


def test_only_image_is_required_and_columns_may_come_in_any_order(pairs, table):
    assert [r.sample_id for r in table("images/a.png", header="image").refs()] == ["images/a"]
    assert table("masks/a.png, images/a.png", header="Mask, Image").refs()[0].has_mask
    absolute = str(pairs / "images/a.png")
    assert table(absolute, header="image").refs()[0].sample_id == "images/a"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (",,,,", "expected an image, got an empty value"),
        ("images/a.png,,,,train", "expected each image once (suffixes apart), got images/a.png again, as in line 2"),
        ("images/sub/b.png,,,2,train", "expected the label 0 (shows none), 1 (shows some) or nothing, got '2'"),
        ("images/sub/b.png,,,,dev", "expected the split train, val, test or nothing, got 'dev'"),
        ("images/sub/b.png,,,,test", "expected a mask for an image of test, got none"),
        ("images/sub/b.png,,,,", "expected a split in every row or in none, got nothing after train"),
        ("images/sub/b.png,masks/sub/b.tif,p,,val", "expected the group p in one split, got val, but train in line 2"),
        ("images/sub/b.png,masks/none.png,,,train", "found no such file; mend the path"),
        ("images/none.png,,,,train", "found no such file; mend the path"),
        ("images/sub/b.gif,,,,train", "got 'images/sub/b.gif'; convert it"),
        ("images/sub/b.png,masks/b.nii,,,train", "as mask of b.png, got b.nii"),
        ("images/sub/b.png,,train", "expected 5 values (image,mask,group,label,split), got 3"),
        ("x.nii.gz,,,1,train", "which cannot hold for every slice"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(pairs, table, row, said):
    if row == ",,,,":
        row = " ,masks/a.png,,,"
    with pytest.raises(UserError) as error:
        table("images/a.png,masks/a.png,p,,train", "", row)
    assert str(error.value).startswith(f"{pairs / 'table.csv'}, line 4: ") and said in str(error.value)


def test_a_wrong_table_is_one_error(pairs, table):
    for header in ("image;mask", "picture,mask", "image,lable", "image,image"):
        with pytest.raises(UserError, match=r"table.csv, line 1: expected a header of image and any of mask"):
            table("images/a.png,x", header=header)
    with pytest.raises(UserError, match="got none below the header"):
        table()
    with pytest.raises(UserError, match=r"data.csv: .*none.csv: expected a CSV file, found no such file"):
        Folder(DataConfig(csv=str(pairs / "none.csv")))
    with pytest.raises(UserError, match="expected a CSV file in UTF-8"):
        table("images/ä.png", header="image", encoding="latin-1")


def test_rows_without_their_files_are_listed(pairs, table):
    source = table("images/a.png,", "images/x.png,", "images/c.png,masks/c.png", header="image,mask", on_error="skip")
    assert [r.sample_id for r in source.refs()] == ["images/a"]
    assert [(s.sample_id, s.problem) for s in source.skipped] == [
        ("images/x", "no such image"),
        ("images/c", "no such mask"),
    ]


def test_a_label_of_0_and_a_mask_with_an_object_contradict(pairs, table):
    with pytest.raises(SampleError, match=r"a\.png: expected an empty mask, as the label in data.csv is 0"):
        table("images/a.png,masks/a.png,,0,").mask("images/a")


def test_quoted_names_with_commas(pairs, table):
    save(pairs / "images/d, e.png", picture(4))
    with (pairs / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask"], ["images/d, e.png", ""]])
    np.testing.assert_array_equal(Folder(DataConfig(csv=str(pairs / "q.csv"))).image("images/d, e"), picture(4))


# -- volumes


def scan(depth=3) -> np.ndarray:
    return np.random.default_rng(5).integers(-400, 400, (depth, *SHAPE)).astype(np.int16)


def test_slices_of_a_volume_are_one_group(tmp_path, opened):
    save_volume(tmp_path / "images/p1/ct.nii.gz", scan())
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
    with pytest.raises(KeyError):
        source.image("p1/ct/slice-0003")


def test_a_volume_needs_a_window(tmp_path, opened):
    save_volume(tmp_path / "images/ct.nii.gz", scan())
    with pytest.raises(UserError, match=r"data.window: .* for ct.nii.gz, got nothing; .*--data.window \[LOW,HIGH\]"):
        opened(masks=None)


def test_masks_of_volumes_must_fit(tmp_path, opened):
    save_volume(tmp_path / "images/ct.nii", scan())
    settings = {"window": (0.0, 1.0), "class_names": THREE}
    for labels, affine, said in (
        (np.zeros((4, *SHAPE), np.uint8), None, "shape 10 x 8 x 3, got 10 x 8 x 4"),
        (np.zeros((3, *SHAPE), np.uint8), np.eye(4), "save it with the image's affine"),
        (np.full((3, *SHAPE), 7, np.uint8), None, "values 7; map"),
        (np.full((3, *SHAPE), -1, np.int16), None, "got -1 in slice 0"),
    ):
        save_volume(tmp_path / "masks/ct.nii", labels, affine)
        with pytest.raises(SampleError, match=said):
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


ROW = np.array([[-100, 0, 50, 99, 199, 200]], np.int16)


@pytest.fixture
def shown(tmp_path, opened):
    def build(values=ROW, window=None, **tags) -> list[int]:
        save_dicom(tmp_path / "images/a.dcm", values, **tags)
        return opened(None, window=window).image("a")[0, :, 0].tolist()

    return build


def test_dicom_windows_by_hand(shown):
    # stored v: 2 v - 100; window 0 to 100: v = 50 is black, 75 in the middle, 100 white
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100}
    assert shown(np.array([[0, 50, 60, 100, 900]], np.uint16), (0.0, 100.0), **tags) == [0, 0, 51, 255, 255]
    # center 100, width 200: black at 0, white at 100 + 100 - 1 = 199; 50 / 199 * 255 = 64.07, 99 / 199 * 255 = 126.86
    own = {"WindowCenter": 100, "WindowWidth": 200}
    assert shown(**own) == [0, 0, 64, 127, 255, 255]
    assert shown(WindowCenter=[100, 5], WindowWidth=[200, 7]) == [0, 0, 64, 127, 255, 255]
    # exact: white at 200; 50 / 200 * 255 = 63.75, 99 / 200 * 255 = 126.2, 199 / 200 * 255 = 253.7
    assert shown(**own, VOILUTFunction="LINEAR_EXACT") == [0, 0, 64, 126, 254, 255]
    assert shown(**own, PhotometricInterpretation="MONOCHROME1") == [255, 255, 191, 128, 0, 0]
    assert shown(window=(-100.0, 155.0), **own)[:3] == [0, 100, 150], "data.window goes first"


def test_dicom_without_a_window(shown):
    with pytest.raises(SampleError, match=r"without WindowCenter .*values -100 to 200\); .*--data.window"):
        shown()
    assert shown(np.array([[0, 7, 255, 9]], np.uint8)) == [0, 7, 255, 9]
    with pytest.raises(SampleError, match="got SIGMOID"):
        shown(WindowCenter=0, WindowWidth=9, VOILUTFunction="SIGMOID")
    with pytest.raises(SampleError, match="of width 1;"):
        shown(WindowCenter=0, WindowWidth=1)


def test_dicom_files_of_a_series_are_one_group(tmp_path, opened):
    for name, series in (("s/1", "1.2"), ("s/2", "1.2"), ("t/1", "1.3")):
        save_dicom(tmp_path / f"images/{name}.dcm", square().astype(np.int16), series, PixelSpacing=[0.5, 0.25])
    save(tmp_path / "masks/s/2.png", square())
    source = opened(window=(0.0, 255.0))
    assert [(r.sample_id, r.group_id, r.has_mask, r.spacing) for r in source.refs()] == [
        ("s/1", "1.2", False, (0.5, 0.25)),
        ("s/2", "1.2", True, (0.5, 0.25)),
        ("t/1", "1.3", False, (0.5, 0.25)),
    ]
    np.testing.assert_array_equal(source.mask("s/2"), square(1))
    np.testing.assert_array_equal(source.image("s/2")[..., 0], square())
    save(tmp_path / "masks/s/2.png", square(shape=(8, 12)))
    with pytest.raises(SampleError, match=r"10 x 8 .*got 12 x 8"):
        source.mask("s/2")


def test_a_series_in_two_splits(tmp_path, table):
    for n in (1, 2):
        save_dicom(tmp_path / f"{n}.dcm", square())
    save(tmp_path / "m.png", square())
    with pytest.raises(UserError, match=r"group 1.2.3 in one split, got 1 in train and 2 in val"):
        table("1.dcm,m.png,,,train", "2.dcm,m.png,,,val")
    assert {r.group_id for r in table("1.dcm,m.png,x,,train", "2.dcm,m.png,y,,val").refs()} == {"x", "y"}


def test_unfit_dicom(tmp_path, opened, shown):
    np.testing.assert_array_equal(shown(picture()), picture()[0, :, 0])
    with pytest.raises(SampleError, match="got YBR_FULL"):
        shown(picture(), PhotometricInterpretation="YBR_FULL")
    with pytest.raises(SampleError, match="of one frame, got 2"):
        shown(NumberOfFrames=2)
    with pytest.raises(SampleError, match="expected a whole DICOM file"):
        shown(PixelData=b"\0\0", WindowCenter=0, WindowWidth=9)


def test_the_cache_takes_all_kinds(tmp_path, opened):
    save(tmp_path / "images/a.jpg", picture())
    save_volume(tmp_path / "images/b.nii", scan())
    save_dicom(tmp_path / "images/c.dcm", ROW)
    save(tmp_path / "masks/a.png", square())
    cache = SampleCache(opened(window=(0.0, 200.0)), 32, tmp_path / "cache")
    assert [r.sample_id for r in cache.refs] == ["a", "b/slice-0000", "b/slice-0001", "b/slice-0002", "c"]
    assert cache.decode_masks(["a"]) == () and cache.mask_resized("a").max() == 1


def test_dicom_files_without_a_suffix_are_images_too(tmp_path, opened):
    values = square().astype(np.int16)
    for name in ("IM0001", "1.2.840.7", "with.dcm"):
        save_dicom(tmp_path / "images" / name, values, series=generate_uid())
    (tmp_path / "images" / "README").write_text("no image")
    source = opened(masks=None, window=(0.0, 255.0))
    assert [ref.sample_id for ref in source.refs()] == ["1.2.840.7", "IM0001", "with"]
    assert np.array_equal(source.image("IM0001"), source.image("with"))
    assert [skipped.sample_id for skipped in source.skipped] == ["README"]
