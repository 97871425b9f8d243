"""Images and masks stored as PNG, JPEG, TIFF, BMP or GIF: windowing of deep images, class ids of mask values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine.data.io.file_content import describe_content
from kmine.data.io.image_file import DEEP_MODES, GREY_MODES, as_rgb, image_shape, read_grey, read_stored
from kmine.data.io.mask_palettes import MaskPalettes, is_grey
from kmine.data.io.windowing import grey_as_rgb, windowed
from kmine.errors import SampleError, first_names
from kmine.io.files import SIGNATURE_KEY, class_colours
from kmine.types import IGNORE_INDEX

WINDOW_CURE = "say which values are black and white with --data.window [LOW,HIGH]"
FOREGROUND_ABOVE = 127
"""Threshold of a black-and-white mask. JPEG compression spreads values around 0 and 255."""
COLOUR_NOISE = 32
"""Largest difference between the channels of a grey JPEG stored in colour."""
BETWEEN, MOST_BETWEEN = (64, 192), 0.5
"""A JPEG with a larger share of its pixels in this range is a photograph, not a mask."""
NEAR = 96, 160
"""Values around the threshold, between which compression scatters a foreground of 127."""
MAX_NAMED = 6


def read_picture(path: Path, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255], of a picture; grey as three equal channels.

    For grey of more than 8 bits, `window` holds the values shown as black and as white.

    Raises:
        SampleError: for the faults of `read_stored`, for more than 8 bits without a window, and for CMYK.
    """
    image = read_stored(path)
    if image.mode.startswith(DEEP_MODES):
        values = np.asarray(image)
        if window is None:
            raise SampleError(
                path,
                f"expected 8 bits per pixel or a window, got more (mode {image.mode}, values {values.min():g} to "
                f"{values.max():g}); {WINDOW_CURE}",
            )
        return grey_as_rgb(windowed(values, window))
    if image.mode not in (*GREY_MODES, "RGB", "P"):
        raise SampleError(path, f"expected a grey or RGB image, got mode {image.mode}; convert it to 8-bit RGB")
    return as_rgb(image)


def read_foreground(path: Path, image: Path) -> NDArray[np.uint8]:
    """(H, W) mask of one class, 1 above `FOREGROUND_ABOVE` and 0 elsewhere, of the size of the file `image`.

    Raises:
        SampleError: for the faults of `read_grey`, another size, and a foreground that is not white.
    """
    grey = read_grey(path)
    require_size(path, grey, image_shape(image))
    if _is_faint(path, grey):
        raise SampleError(
            path,
            f"expected a mask of 0 and 255, got values up to {grey.max()} (colours as grey), "
            f"{(grey > FOREGROUND_ABOVE).mean():.1%} of the pixels above {FOREGROUND_ABOVE}; store the foreground as "
            "255 (not 1)",
        )
    return (grey > FOREGROUND_ABOVE).astype(np.uint8)


def _is_faint(path: Path, values: NDArray[Any]) -> bool:
    """Whether a mask is not all 0 but has nothing above the threshold or, in a JPEG file, more near it than above."""
    if _is_jpeg(path) and ((values >= NEAR[0]) & (values < NEAR[1])).sum() > (values >= NEAR[1]).sum():
        return True
    return 0 < values.max() <= FOREGROUND_ABOVE


def require_size(path: Path, mask: NDArray[np.uint8], shape: tuple[int, int]) -> None:
    """Refuse a mask of another size than (height, width) of its image. Raises `SampleError`."""
    if mask.shape != shape:
        expected, actual = (f"{size[1]} x {size[0]} (width x height)" for size in (shape, mask.shape))
        raise SampleError(
            path, f"expected the image's size {expected}, got {actual}; export the mask anew in the image's size"
        )


def read_mask_picture(
    path: Path, class_names: Sequence[str], palettes: MaskPalettes | None = None
) -> NDArray[np.uint8]:
    """(H, W) class ids of a picture, of a JPEG file for two classes only; see `class_ids`.

    In a JPEG file, compression blurs the values: those above `FOREGROUND_ABOVE` are the object. kmine's own masks and
    those with a colour palette hold class ids, and 255 for ignored pixels. `palettes` are those of the data set.

    Raises:
        SampleError: for the faults of `read_stored`, for colours, and for values that are no class ids.
    """
    image = read_stored(path)
    palette = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    if image.mode == "P" and len(palette) > 1 and np.array_equal(palette, class_colours(256)[: len(palette)]):
        return class_ids(path, np.array(image), class_names, are_ids=True)  # a mask of kmine, whatever the others are
    if image.mode == "P" and not is_grey(palette):
        usable = palettes if palettes is not None and len(class_names) > 2 else MaskPalettes()
        return class_ids(path, usable.class_ids(path, np.array(image), palette), class_names, are_ids=True)
    values = _mask_values(path, image)
    if not _is_jpeg(path):
        return class_ids(path, values, class_names, are_ids=SIGNATURE_KEY in image.info)
    if len(class_names) > 2:
        raise SampleError(path, "expected class ids, got a JPEG file, which blurs them; store the mask as PNG")
    between = ((values >= BETWEEN[0]) & (values < BETWEEN[1])).mean()
    if between > MOST_BETWEEN or _is_faint(path, values):
        raise SampleError(
            path,
            f"expected a mask of 0 and 255, got values {values.min()} to {values.max()}, {between:.0%} of them in the "
            "middle; is this an image? Store masks as PNG of 0 and 255",
        )
    return (values > FOREGROUND_ABOVE).astype(np.uint8)


def class_ids(
    path: Path, values: NDArray[Any], class_names: Sequence[str], *, are_ids: bool = False
) -> NDArray[np.uint8]:
    """Class ids of the values of a mask, of any shape.

    Two classes: 255 is the object if no 1 occurs, else, and with `are_ids`, it is ignored. More classes: values are
    class ids, 255 is ignored. Raises `SampleError` for any other value.
    """
    present = set(np.unique(values).tolist())
    if len(class_names) == 2 and not are_ids and present <= {0, IGNORE_INDEX}:
        return (values == IGNORE_INDEX).astype(np.uint8)
    foreign = sorted(present - {*range(len(class_names)), IGNORE_INDEX})
    if not foreign:
        return values.astype(np.uint8)
    foreign_text = first_names([f"{value:g}" for value in foreign], MAX_NAMED)
    names = ", ".join(f"{n} {name}" for n, name in enumerate(class_names))
    if len(class_names) == 2:
        raise SampleError(
            path,
            f"expected a mask of 0 and 255, or of 0 and 1 ({names}), got also the values {foreign_text}; store the "
            "object as 255 and nothing between, or, if they are classes, name each in --data.class_names "
            "[background,...]",
        )
    raise SampleError(
        path,
        f"expected the class ids {names}, and {IGNORE_INDEX} for ignored pixels, got also the values {foreign_text}; "
        "map them to these, or name every class in data.class_names",
    )


def _is_jpeg(path: Path) -> bool:
    return describe_content(path) == "a JPEG picture"


def _mask_values(path: Path, image: Image.Image) -> NDArray[Any]:
    """(H, W) grey values."""
    if image.mode in ("1", "P"):
        return np.array(image.convert("L"))
    if image.mode == "L" or image.mode.startswith(DEEP_MODES):
        return np.asarray(image)
    if image.mode != "RGB":
        raise SampleError(path, f"expected a grey mask, got mode {image.mode}; convert it to 8-bit grey")
    channels = np.asarray(image)
    spread = int((channels.max(axis=2) - channels.min(axis=2)).max())
    if spread > (COLOUR_NOISE if _is_jpeg(path) else 0):
        raise SampleError(
            path,
            "expected a grey mask, got colours; store 0 and 255, or class ids, as a grey PNG (or one with a palette)",
        )
    return np.array(image.convert("L"))
