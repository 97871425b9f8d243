"""Images and masks as PNG, TIFF and JPEG: windows, class ids, and one error for each misfit."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.image_files import SHAPE, THREE_CLASSES, colour_noise, save_image, square
from PIL import Image

from kmine.data.io.pictures import class_ids, read_foreground, read_mask_picture, read_picture
from kmine.errors import SampleError

TWO_CLASSES = ("background", "object")


def test_grey_is_read_as_three_equal_channels(tmp_path):
    grey = read_picture(save_image(tmp_path / "grey.tif", square(77)), None)
    np.testing.assert_array_equal(grey, np.repeat(square(77)[..., None], 3, 2))
    bits = read_picture(save_image(tmp_path / "bits.png", square(1) > 0), None)
    assert bits.shape == (*SHAPE, 3) and np.unique(bits).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("a.png", "uint16"), ("a.tif", "uint16"), ("big.tif", ">u2"), ("signed.tif", "int32"), ("float.tif", "float32")],
)
def test_deep_grey_is_windowed(tmp_path, name, dtype):
    path = save_image(tmp_path / name, np.array([[0, 100, 150, 200, 300, 400]]).astype(dtype))
    # (150 - 100) / 200 * 255 = 63.75; (200 - 100) / 200 * 255 = 127.5, rounded to the even 128
    assert read_picture(path, (100.0, 300.0))[0, :, 2].tolist() == [0, 0, 64, 128, 255, 255]
    with pytest.raises(SampleError, match=r"values 0 to 400\); .*--data.window \[LOW,HIGH\]"):
        read_picture(path, None)


def test_a_window_does_not_change_8_bit_images(tmp_path):
    np.testing.assert_array_equal(
        read_picture(save_image(tmp_path / "a.png", colour_noise()), (0.0, 9.0)), colour_noise()
    )


def test_unsuitable_images_are_refused(tmp_path):
    deep = colour_noise().astype(np.uint16) * 256
    pages = [Image.fromarray(colour_noise(n)) for n in range(2)]
    save_image(tmp_path / "alpha.png", np.dstack([colour_noise(), square()]))
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    cv2.imwrite(str(tmp_path / "deep.tif"), deep)
    Image.fromarray(colour_noise()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    cut = save_image(tmp_path / "cut.png", colour_noise())
    cut.write_bytes(cut.read_bytes()[:-60])
    for name, problem in {
        "alpha.png": "with alpha",
        "deep.png": "got 16 or more",
        "deep.tif": "got 16 or more",
        "cmyk.jpg": "mode CMYK",
        "pages.tif": "got several pages",
        "cut.png": "truncated",
    }.items():
        with pytest.raises(SampleError, match=problem):
            read_picture(tmp_path / name, (0.0, 9.0))


# -- masks


def read_back(folder: Path, mask: np.ndarray | Image.Image, name="a.png", class_names=TWO_CLASSES) -> np.ndarray:
    return read_mask_picture(save_image(folder / name, mask), class_names)


@pytest.mark.parametrize("mask", [square(255), square(1), square(1).astype(np.uint16), square(1) > 0])
def test_an_object_of_two_classes_is_stored_as_255_or_1(tmp_path, mask):
    np.testing.assert_array_equal(read_back(tmp_path, mask), square(1))
    np.testing.assert_array_equal(read_back(tmp_path, np.zeros(SHAPE, np.uint8)), np.zeros(SHAPE))


def test_beside_1_the_value_255_is_ignored(tmp_path):
    mask = square(1)
    mask[0, 0] = 255
    np.testing.assert_array_equal(read_back(tmp_path, mask), mask)


def test_a_jpeg_mask_is_thresholded(tmp_path):
    large = np.kron(square(255), np.ones((4, 4), np.uint8))
    grey = np.repeat(large[..., None], 3, axis=2)
    mask = read_back(tmp_path, grey, "a.jpg")
    assert len(np.unique(np.array(Image.open(tmp_path / "a.jpg").convert("L")))) > 2
    np.testing.assert_array_equal(mask, large // 255)
    with pytest.raises(SampleError, match="JPEG file, which blurs them; store the mask as PNG"):
        read_back(tmp_path, grey, "a.jpg", THREE_CLASSES)
    with pytest.raises(SampleError, match=r"got values 0 to [12],.*PNG of 0 and 255"):
        read_back(tmp_path, large // 255, "a.jpg")
    with pytest.raises(SampleError, match="100% of them in the middle; is this an image"):
        read_back(tmp_path, np.full(SHAPE, 130, np.uint8), "a.jpg")


def test_a_jpeg_mask_is_known_by_content(tmp_path):
    large = np.kron(square(255), np.ones((4, 4), np.uint8))
    path = save_image(tmp_path / "a.jpg", large).rename(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask_picture(path, TWO_CLASSES), large // 255)
    path = save_image(tmp_path / "b.png", square(1)).rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(read_mask_picture(path, TWO_CLASSES), square(1))


@pytest.mark.parametrize("suffix", ["bmp", "gif"])
def test_masks_as_bmp_and_gif_are_read(tmp_path, suffix):
    np.testing.assert_array_equal(read_back(tmp_path, square(255), f"a.{suffix}"), square(1))


def test_values_of_three_classes_are_ids(tmp_path):
    mask = square(2)
    mask[0] = (0, 1, 2, 255, 0, 0, 0, 0, 0, 0)
    np.testing.assert_array_equal(read_back(tmp_path, mask, class_names=THREE_CLASSES), mask)
    coloured = Image.fromarray(mask)
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 750 + [255, 255, 255])
    np.testing.assert_array_equal(read_back(tmp_path, coloured, class_names=THREE_CLASSES), mask)


def test_a_grey_palette_is_read_by_its_grey_values(tmp_path):
    inverted = Image.fromarray(1 - square(1))
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(read_back(tmp_path, inverted), square(1))


def test_other_values_are_refused_with_the_cure(tmp_path):
    with pytest.raises(SampleError, match=r"\(0 background, 1 object\), got also the values 38; .*--data.class_names"):
        read_back(tmp_path, square(38))
    with pytest.raises(SampleError, match=r"2 tumour, and 255 for ignored pixels, got also the values 3; map"):
        class_ids(tmp_path, square(3), THREE_CLASSES)
    with pytest.raises(SampleError, match=r"values 2, 3, 4, 5, 6, 7 and 72 more"):
        class_ids(tmp_path, np.arange(80, dtype=np.uint8).reshape(8, 10), TWO_CLASSES)
    with pytest.raises(SampleError, match=r"values 65535"):
        read_back(tmp_path, square(1).astype(np.uint16) * 65535)
    with pytest.raises(SampleError, match="expected a grey mask, got colours"):
        read_back(tmp_path, np.dstack([square(), square(0), square(0)]))


def test_foreground_is_above_127_and_has_the_size_of_the_image(tmp_path):
    image = save_image(tmp_path / "image.png", colour_noise())
    values = np.zeros(SHAPE, np.uint8)
    values[0, :3] = (127, 128, 255)
    assert read_foreground(save_image(tmp_path / "a.png", values), image)[0, :4].tolist() == [0, 1, 1, 0]
    with pytest.raises(SampleError, match=r"size 10 x 8 .*got 12 x 8 "):
        read_foreground(save_image(tmp_path / "wide.png", square(shape=(8, 12))), image)
    with pytest.raises(SampleError, match=r"store the foreground as 255 \(not 1\)"):
        read_foreground(save_image(tmp_path / "one.png", square(1)), image)
    assert not read_foreground(save_image(tmp_path / "empty.png", square(0)), image).any()
    assert read_foreground(save_image(tmp_path / "faint.png", square(128)), image).any()


def faint_masks() -> dict[str, Image.Image]:
    """Masks that were re-saved with another foreground than white."""
    red = np.zeros((*SHAPE, 3), np.uint8)
    red[..., 0] = square(255)
    indexed = Image.fromarray(square(1)).copy()
    indexed.putpalette([0, 0, 0, 128, 0, 0])
    grey = {f"{value}": Image.fromarray(square(value)) for value in (1, 2, 126, 127)}
    return grey | {"red": Image.fromarray(red), "palette": indexed}


@pytest.mark.parametrize("kind", faint_masks())
def test_a_mask_with_nothing_above_the_threshold_is_a_mistake(tmp_path, kind):
    image = save_image(tmp_path / "image.png", colour_noise())
    faint_masks()[kind].save(tmp_path / "m.png")
    with pytest.raises(
        SampleError, match=r"m\.png: expected a mask of 0 and 255, got values up to .* 0\.0% of the pixels"
    ):
        read_foreground(tmp_path / "m.png", image)


@pytest.mark.parametrize("value", [2, 100, 127, 135])
def test_compression_scatters_a_faint_foreground_around_the_threshold(tmp_path, value):
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 20:44] = value
    save_image(tmp_path / "image.png", np.zeros((64, 64, 3), np.uint8))
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=70)
    with pytest.raises(SampleError, match="expected a mask of 0 and 255"):
        read_foreground(tmp_path / "m.jpg", tmp_path / "image.png")
    with pytest.raises(SampleError, match="expected a mask of 0 and 255"):
        read_mask_picture(tmp_path / "m.jpg", TWO_CLASSES)
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(tmp_path / "m.jpg", quality=70)
    assert read_foreground(tmp_path / "m.jpg", tmp_path / "image.png").sum() == 24 * 24
    assert read_mask_picture(tmp_path / "m.jpg", TWO_CLASSES).sum() == 24 * 24
