"""Strict decoding: one error for every fault that Pillow would convert or repair silently."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.image_files import colour_noise, save_image, square
from PIL import Image

from kmine.data.io import image_file
from kmine.data.io.image_file import image_shape, read_grey, read_rgb, read_stored
from kmine.errors import SampleError

RGB = colour_noise(shape=(40, 50))


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def save_alpha_palette(path: Path) -> None:
    Image.fromarray(RGB).quantize(16).save(path, transparency=0)


FAULTS = {
    "empty": ("a.png", lambda path: path.touch(), r"empty file \(0 bytes\)"),
    "missing": ("a.png", lambda path: None, "found no such file"),
    "foreign": ("a.png", lambda path: path.write_text("<html>404</html>"), "got a web page; download the file itself"),
    "16-bit": ("a.png", lambda path: save_image(path, RGB[..., 0].astype(np.uint16) * 256), "got 16 or more"),
    "16-bit colour": ("a.png", lambda path: cv2.imwrite(str(path), RGB.astype(np.uint16) * 256), "got 16 or more"),
    "alpha": ("a.png", lambda path: save_image(path, np.dstack([RGB, RGB[..., :1]])), "RGBA with alpha"),
    "palette with alpha": ("a.png", save_alpha_palette, "P with alpha"),
    "grey": ("a.png", lambda path: save_image(path, RGB[..., 0]), r"got a grey one \(L\)"),
    "truncated PNG": ("a.png", lambda path: cut(save_image(path, RGB), 1500), "truncated or damaged"),
    "truncated JPEG": ("a.jpg", lambda path: cut(save_image(path, RGB), 200), "truncated or damaged"),
    "rotated": ("a.jpg", lambda path: save_image(path, RGB, exif=rotated()), "EXIF orientation 6"),
    "CMYK": ("a.jpg", lambda path: Image.fromarray(RGB).convert("CMYK").save(path), "mode CMYK"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_unsuitable_file_is_one_error_that_names_it(tmp_path, kind):
    name, write, expected = FAULTS[kind]
    write(tmp_path / name)
    with pytest.raises(SampleError, match=expected) as caught:
        read_rgb(tmp_path / name)
    assert caught.value.path == str(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [b"IDAT", b"IHDR"])
def test_a_wrong_checksum_of_a_png_chunk_is_refused(tmp_path, chunk):
    path = save_image(tmp_path / "a.png", RGB)
    content = bytearray(path.read_bytes())
    start = content.index(chunk) - 4
    length = int.from_bytes(content[start : start + 4], "big")
    content[start + 8 + length] ^= 1  # first byte of the CRC
    path.write_bytes(bytes(content))
    with pytest.raises(SampleError, match=r"truncated or damaged|destroyed header"):
        read_rgb(path)


@pytest.mark.parametrize("limit", [(image_file, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")])
def test_too_many_pixels_are_refused(tmp_path, monkeypatch, limit):
    path = save_image(tmp_path / "a.png", RGB)
    monkeypatch.setattr(*limit, 100)
    with pytest.raises(SampleError, match="sane size"):
        read_rgb(path)


def test_valid_files_are_read_unchanged(tmp_path):
    path = save_image(tmp_path / "a.png", RGB)
    assert image_shape(path) == (40, 50)
    np.testing.assert_array_equal(read_rgb(path), RGB)
    grey = save_image(tmp_path / "grey.tif", square(77))
    np.testing.assert_array_equal(read_rgb(grey, allow_grey=True), np.repeat(square(77)[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_grey(grey), square(77))
    Image.fromarray(RGB).quantize(16).save(tmp_path / "palette.png")
    assert read_rgb(tmp_path / "palette.png").shape == (40, 50, 3)


def test_deep_grey_in_which_0_is_white_is_refused(tmp_path):
    path = save_image(tmp_path / "a.tif", np.arange(6, dtype=np.uint16).reshape(1, 6))
    content = path.read_bytes()
    entry = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert content.count(entry + b"\1\0") == 1
    assert np.asarray(read_stored(path)).max() == 5
    path.write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    with pytest.raises(SampleError, match="got 0 as white; invert it"):
        read_stored(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "I;16"])
def test_transparency_counts_only_where_a_pixel_has_it(tmp_path, mode):
    grey = np.kron(np.array([[9, 200], [0, 200]], np.uint8), np.ones((4, 5), np.uint8))
    plain = Image.fromarray(grey.astype(np.uint16) if mode == "I;16" else grey)
    image = plain.convert("P").convert("PA") if mode == "PA" else plain if mode == "I;16" else plain.convert(mode)
    # a colour of no pixel, and that of some
    unused, used = ((7, 7, 7), (9, 9, 9)) if mode == "RGB" else (7, 9)
    has_alpha = "A" in mode
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        image = image.convert("LA")  # no format of ours stores PA
    image.save(path, **({} if has_alpha else {"transparency": unused}))
    stored = read_stored(path)
    assert "A" not in stored.mode and "transparency" not in stored.info
    np.testing.assert_array_equal(np.asarray(stored.convert("L") if mode != "I;16" else stored), grey)
    if has_alpha:
        alpha = np.full(grey.shape, 255, np.uint8)
        alpha[0, 0] = 254
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    else:
        image.save(path, transparency=used)
    with pytest.raises(SampleError, match="without transparency, got mode"):
        read_stored(path)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "png"])
def test_bmp_and_gif_are_read_by_content(tmp_path, suffix):
    for kind in ("BMP", "GIF"):
        Image.fromarray(square()).save(tmp_path / f"a.{suffix}", kind)
        np.testing.assert_array_equal(read_grey(tmp_path / f"a.{suffix}"), square())
    frames = [Image.fromarray(square(value)) for value in (1, 2)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(SampleError, match="got several pages or frames"):
        read_stored(tmp_path / "b.gif")
