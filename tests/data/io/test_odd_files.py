"""Unusual files and names: read correctly, or refused with one error; valid files beside them are read."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.odd_files import SHAPE, dicom, nifti, noise, outcome, place, png, settings
from PIL import Image

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.errors import UserError

# -- read


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_rotated_images_and_masks_are_refused(tmp_path, suffix):
    """TIFF included, which Pillow rotates itself, uncompressed files wrongly."""
    exif = Image.Exif()
    exif[274] = 6  # the first row is the right side
    blocks = np.kron(np.array([[0, 1], [1, 1]], np.uint8) * 255, np.ones((8, 16), np.uint8))  # lossless as a JPEG, too
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for name, options in {"rotated": {"exif": exif}, "upright": {}}.items():
            Image.fromarray(blocks).save(tmp_path / kind / f"{name}.{suffix}", quality=100, **options)
    source = open_source(settings(tmp_path, masks=True))
    np.testing.assert_array_equal(source.image("upright")[..., 0], source.mask("upright") * 255)
    for read in (source.image, source.mask):
        with pytest.raises(UserError, match="orientation 6; rotate the pixels"):
            read("rotated")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


GREY, RGB = noise(), noise((*SHAPE, 3))
READ: dict[str, tuple[str, bytes, np.ndarray]] = {
    "a PNG named .jpg": ("a.jpg", saved(Image.fromarray(RGB), "PNG"), RGB),
    "a PNG named .tif": ("a.TIF", saved(Image.fromarray(GREY), "PNG"), GREY),
    "1 bit": ("a.png", saved(Image.fromarray(GREY > 99), "PNG"), (GREY > 99) * np.uint8(255)),
    "16 bit": ("a.png", saved(Image.fromarray(GREY.astype(np.uint16)), "PNG"), GREY),
    "a palette": ("a.tif", saved(Image.fromarray(GREY).convert("P"), "TIFF"), GREY),
    "1 x N": ("a.png", saved(Image.fromarray(noise((1, 3000))), "PNG"), noise((1, 3000))),
    "N x 1": ("a.tif", saved(Image.fromarray(noise((70000, 1))), "TIFF"), noise((70000, 1))),
    "an opaque alpha channel": ("a.png", saved(Image.fromarray(RGB).convert("RGBA"), "PNG"), RGB),
    "a BMP": ("a.bmp", saved(Image.fromarray(RGB), "BMP"), RGB),
    "a GIF named .png": ("a.png", saved(Image.fromarray(GREY), "GIF"), GREY),
    "one pixel": ("a.png", saved(Image.fromarray(noise((1, 1))), "PNG"), noise((1, 1))),
}


@pytest.mark.parametrize("kind", READ)
def test_unusual_but_valid_images_are_read(tmp_path, kind):
    name, content, expected = READ[kind]
    place(tmp_path, name, content)
    assert outcome(settings(tmp_path, "stop")) == (["a", "good"], [])
    image = open_source(settings(tmp_path)).image("a")
    np.testing.assert_array_equal(image, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i2", "u4", "i8", "f4", "f8"])
def test_nifti_of_any_byte_order_and_type_is_read(tmp_path, dtype, order):
    values = noise((20, 24, 3), dtype=np.dtype(order + dtype))
    if dtype[0] == "f":
        values[:3, 0, 0] = np.nan, np.inf, -np.inf
    place(tmp_path, "a.nii", b"")
    header = nibabel.Nifti1Header(endianness=order)
    image = nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1]), header, dtype=values.dtype)
    nibabel.save(image, tmp_path / "images/a.nii")
    source = open_source(settings(tmp_path))
    expected = np.nan_to_num(values.astype(float), nan=0, posinf=255, neginf=0).astype(np.uint8)
    for number in range(3):
        np.testing.assert_array_equal(source.image(f"a/slice-{number:04}")[..., 0], expected[..., number].T)


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "CMYK": ("a.jpg", saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "mode CMYK"),
    "alpha": ("a.png", saved(Image.fromarray(np.dstack([RGB, GREY])), "PNG"), "with alpha"),
    "pages": (
        "a.tif",
        saved(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("L", (2, 2))]),
        "page",
    ),
    "frames": (
        "a.png",
        saved(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.new("RGB", (20, 24))]),
        "page",
    ),
    "WebP": ("a.png", saved(Image.fromarray(GREY), "WEBP"), "TIFF, BMP or GIF), got a WebP picture; convert it"),
    "PostScript": ("a.png", saved(Image.fromarray(RGB), "EPS"), "got a PostScript file; convert it"),
    "an array": ("a.png", b"\x93NUMPY" + bytes(99), "got a NumPy array; convert it"),
    "a DICOM file": ("a.nii", dicom(), "expected a NIfTI volume, got a DICOM file; rename it by its content"),
    "no width": ("a.png", png(0, 9, zlib.compress(b"")), "expected"),
    "no rows": ("a.dcm", dicom(Rows=0), "with pixels, got 20 x 0"),
    "unknown compression": ("a.dcm", dicom("1.2.3.4.5.6"), "that pydicom can undo"),
    "a scale that is no number": ("a.dcm", dicom(RescaleSlope="nan"), "that pydicom can undo"),
    "complex numbers": ("a.nii", nifti((20, 24, 3), bytes(99999), np.complex64), "expected plain numbers"),
    "colours": ("a.nii", nifti((20, 24, 3), bytes(99999), 128), "expected plain numbers"),
    "no slices": ("a.nii", nifti((20, 24, 0), bytes(99999)), "expected a volume of three axes"),
    "an infinite affine": (
        "a.nii",
        nifti((20, 24, 3), bytes(1440)).replace(struct.pack("<f", -1), struct.pack("<f", np.inf)),
        "affine",
    ),
    "an affine of no numbers": (
        "a.nii",
        nifti((20, 24, 3), bytes(1440)).replace(struct.pack("<f", -1), struct.pack("<f", np.nan)),
        "",
    ),
    "one row too many": ("a.nii.gz", gzip.compress(nifti((20, 24, 3), bytes(20 * 24 * 4))), "more than the"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_files_are_refused(tmp_path, kind):
    name, content, problem = REFUSED[kind]
    path = place(tmp_path, name, content)
    found, problems = outcome(settings(tmp_path))
    assert found == ["good"] and len(set(problems)) == 1 and problem in problems[0], problems
    with pytest.raises(UserError, match=re.escape(str(path))):
        outcome(settings(tmp_path, "stop"))


NAMES = [
    "a\nb",
    "ünï",
    "cafe\u0301",
    "-rf",
    "<script>",
    "a b [1] (2)",
    "x" * 246,
    "a.b.c",
    " a ",
    "'\"`$;",
    "%s{0}",
    "日本",
]


def test_unusual_names_are_read(tmp_path):
    for name in NAMES:
        for kind in ("images", "masks"):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(disc() if kind == "masks" else GREY).save(path)
    cfg = settings(tmp_path, "stop", masks=True)
    found, skipped = outcome(cfg)
    assert skipped == [] and sorted(found) == sorted(unicodedata.normalize("NFC", name) for name in NAMES)
    assert SampleCache(open_source(cfg), 32, tmp_path / "cache").decode_masks(found) == ()


def disc() -> np.ndarray:
    return np.where(GREY > 99, 255, 0).astype(np.uint8)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
@pytest.mark.parametrize("name", ["folder", "kvasir_seg"])
def test_a_name_that_is_not_utf_8_stops_or_is_listed(tmp_path, name):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for stem in (b"good", b"gr\xf6\xdfe"):
            Image.fromarray(RGB if kind == "images" else disc()).save(tmp_path / kind / os.fsdecode(stem + b".png"))
    cfg = DataConfig(name=name, root=str(tmp_path), images=f"{tmp_path}/images", masks=f"{tmp_path}/masks")
    with pytest.raises(UserError, match=r"gr\\xf6\\xdfe.png: expected a name in UTF-8"):
        open_source(cfg)
    source = open_source(replace(cfg, on_error="skip"))
    assert [ref.sample_id for ref in source.refs()] == ["good"] and len(source.skipped) == 2
    json.dumps([skipped.path for skipped in source.skipped], ensure_ascii=False).encode()


TABLES: dict[str, Callable[[Path, bytes], object]] = {
    "zero bytes": lambda path, good: path.write_bytes(b""),
    "zeros": lambda path, good: path.write_bytes(bytes(99)),
    "UTF-16": lambda path, good: path.write_bytes(good.decode().encode("utf-16")),
    "Latin-1": lambda path, good: path.write_bytes(good + b"gr\xf6\xdfe,1\n"),
    "cut in a quoted value": lambda path, good: path.write_bytes(good + b'"good.png'),
    "one row too long": lambda path, good: path.write_bytes(good + b"a,b,c,d,e,f,g\n"),
    "a huge value": lambda path, good: path.write_bytes(good + b"x" * 200_000 + b",1\n"),
    "a long name": lambda path, good: path.write_bytes(good + b"x" * 300 + b".png,1\n"),
    "a zero in a name": lambda path, good: path.write_bytes(good + b"a\0b.png,1\n"),
    "thousands of digits": lambda path, good: path.write_bytes(good + b"volume-1/slice-" + b"9" * 9000 + b",1\n"),
    "a folder": lambda path, good: path.mkdir(),
    "a link to nothing": lambda path, good: path.symlink_to(path.parent / "gone"),
    "a link to itself": lambda path, good: path.symlink_to(path),
    "a pipe": lambda path, good: os.mkfifo(path),
}


@pytest.mark.parametrize("name", ["folder", "lits"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_is_one_error_that_names_it(tmp_path, kind, name):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    nibabel.save(nibabel.Nifti1Image(noise((4, 4, 3)), np.diag([-1, -1, 2, 1])), tmp_path / "volume-1.nii")
    good = b"image,label\ngood.png,1\n" if name == "folder" else b"sample_id,label\nvolume-1/slice-0001,1\n"
    table = tmp_path / "table.csv"
    cfg = DataConfig(name=name, root=str(tmp_path), **{"csv" if name == "folder" else "image_labels": str(table)})
    table.write_bytes(good)
    assert open_source(cfg).refs()
    table.unlink()
    TABLES[kind](table, good)
    with pytest.raises(UserError, match=re.escape(str(table))):
        open_source(cfg)
