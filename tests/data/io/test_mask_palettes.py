"""Colour palettes of masks: the most common one decides, black is the background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import THREE_CLASSES, save_image
from PIL import Image

from kmine.data.io.mask_palettes import MaskPalettes
from kmine.data.io.pictures import read_mask_picture
from kmine.errors import SampleError
from kmine.io.files import class_colours, encode_png

BLACK, GREEN, RED = (0, 0, 0), (0, 255, 0), (255, 0, 0)


def save(path: Path, indices: list[int], *colours: tuple[int, int, int]) -> Path:
    picture = Image.fromarray(np.array([indices], np.uint8))
    picture.putpalette([value for colour in colours for value in colour])
    return save_image(path, picture)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_colour_is_the_class_that_it_is_in_most_files(tmp_path, suffix):
    files = [save(tmp_path / f"{n}.{suffix}", [0, 1, 2], BLACK, GREEN, RED) for n in range(2)]
    files.append(save(tmp_path / f"other.{suffix}", [0, 1, 2], BLACK, RED, GREEN))
    files.append(save(tmp_path / "short.png", [0, 1, 1], BLACK, GREEN))
    files.append(save_image(tmp_path / "grey.png", np.array([[0, 1, 2]], np.uint8)))
    palettes = MaskPalettes(files)
    read = [read_mask_picture(path, THREE_CLASSES, palettes)[0].tolist() for path in files]
    assert read == [[0, 1, 2], [0, 1, 2], [0, 2, 1], [0, 1, 1], [0, 1, 2]]
    if suffix == "png":
        assert [path.name for path in palettes.differing] == ["other.png"]
    assert "(0, 255, 0) is liver, (255, 0, 0) is tumour" in palettes.note(THREE_CLASSES)
    assert MaskPalettes(files[:2]).note(THREE_CLASSES) == "" == MaskPalettes(()).note(THREE_CLASSES)
    assert MaskPalettes(files[2:3], first=palettes).reference[1] == GREEN


def test_foreign_colours_and_a_coloured_background_are_refused(tmp_path):
    palettes = MaskPalettes([save(tmp_path / "a.png", [0, 1, 2], BLACK, GREEN, RED)])
    with pytest.raises(SampleError, match=r"colours of the other masks .*got \(9, 9, 9\)"):
        read_mask_picture(save(tmp_path / "b.png", [0, 1], BLACK, (9, 9, 9), RED), THREE_CLASSES, palettes)
    assert (
        read_mask_picture(save(tmp_path / "b.png", [0, 2], BLACK, (9, 9, 9), RED), THREE_CLASSES, palettes).max() == 2
    )
    with pytest.raises(SampleError, match=r"black as the first colour .*got it as colour 1"):
        read_mask_picture(save(tmp_path / "c.png", [0, 1], RED, BLACK), THREE_CLASSES[:2])


def test_255_of_a_colour_palette_is_ignored(tmp_path):
    mask = save(tmp_path / "a.png", [0, 255], BLACK, RED, *[BLACK] * 253, (224, 224, 192))
    assert read_mask_picture(mask, THREE_CLASSES[:2])[0].tolist() == [0, 255]


@pytest.mark.parametrize("num_colours", [256, 3])
def test_a_mask_of_kmine_holds_class_ids_whatever_the_palettes_of_the_others(tmp_path, num_colours):
    others = MaskPalettes([save(tmp_path / "a.png", [0, 1, 2], BLACK, GREEN, RED)])
    own = tmp_path / "own.png"
    own.write_bytes(encode_png(np.array([[0, 2, 1, 255]], np.uint8), palette=True))
    with Image.open(own) as image:
        assert image.mode == "P" and image.convert("RGB").getpixel((1, 0)) == tuple(class_colours(3)[2].tolist())
    if num_colours == 3:  # as an editor saves it again
        own = save(tmp_path / "again.png", [0, 2, 1], *class_colours(3).tolist())
    expected = [0, 2, 1, 255][:num_colours]
    assert read_mask_picture(own, THREE_CLASSES, others)[0].tolist() == expected
