"""Strict reading of PNG, JPEG, TIFF, BMP and GIF files: refuses whatever Pillow would convert or repair silently."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kmine.data.io.file_content import describe_content, foreign_file, problem_text
from kmine.data.source import BLOCK_BYTES, require_file
from kmine.errors import SampleError

MAX_PIXELS = 2**26
"""Limit for an image or slice, 8192 x 8192, three times a mammogram: a larger header is damaged or hostile."""
MAX_SCANNED = 2**31
"""Limit for pixels times scans of a JPEG file, each of which decodes all pixels: 32 scans of the largest image."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")
"""Formats that Pillow may detect; some of the many others run external programs."""
ORIENTATION_TAG = 0x0112
PIXEL_TAGS = frozenset((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339))
"""TIFF tags that decide pixels where present; Pillow ignores those it cannot read."""
MAX_TAGS = 2**16
TILE_TAGS, SMALL_TILE = (322, 323), 2**22
"""Width and height of a tile; number of pixels up to which a tile may be larger than its image."""
PHOTOMETRIC_TAG, WHITE_IS_ZERO = 0x0106, 0
GREY_MODES = ("1", "L")
DEEP_MODES = ("I", "F")
ALPHA_MODES = {"RGBA": "RGB", "RGBa": "RGB", "LA": "L", "La": "L", "PA": "P"}
"""Modes with an alpha channel, and the same without."""
OPAQUE = 255
PICTURES = f"an image ({', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
READABLE = tuple(f"a {name} picture" for name in FORMATS)


def read_rgb(path: Path, *, allow_grey: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255], of an 8-bit colour image or, with `allow_grey`, of a grey one as three equal channels.

    Raises:
        SampleError: for a missing, empty, truncated, foreign, too large, 16-bit, grey, transparent or rotated file,
            and for one of several pages.
    """
    with _open(path) as image:
        _refuse_unsuitable(path, image)
        mode = ALPHA_MODES.get(image.mode, image.mode)
        if mode in GREY_MODES and not allow_grey:
            raise SampleError(path, f"expected a colour image (RGB), got a grey one ({mode}); convert it to RGB")
        if mode not in (*GREY_MODES, "RGB", "P"):
            raise SampleError(path, f"expected an RGB image, got mode {mode}; convert it to 8-bit RGB")
        return as_rgb(_load(path, image))


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255], of a decoded image; an RGB image is not copied twice."""
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_grey(path: Path) -> NDArray[np.uint8]:
    """(H, W) grey values, [0, 255], of a mask stored grey or in colour. Raises `SampleError` as `read_rgb` does."""
    with _open(path) as image:
        _refuse_unsuitable(path, image)
        if ALPHA_MODES.get(image.mode, image.mode) not in (*GREY_MODES, "RGB", "P"):
            raise SampleError(path, f"expected a grey or RGB mask, got mode {image.mode}; convert it to 8-bit grey")
        return np.array(_load(path, image).convert("L"))


def read_stored(path: Path) -> Image.Image:
    """Decode an image of one page as stored: 8 bits in any mode, or grey of more bits.

    Raises:
        SampleError: for a missing, empty, truncated, foreign, too large, transparent or rotated file, for colour of
            more than 8 bits, for more than one page, and for deeper grey in which 0 is white.
    """
    with _open(path) as image:
        _refuse_unsuitable(path, image, allow_deep_grey=True)
        if image.mode.startswith(DEEP_MODES) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO:
            # Pillow inverts 8-bit files of this kind, but not deeper ones.
            raise SampleError(path, "expected a TIFF file in which 0 is black, got 0 as white; invert it")
        return _load(path, image)  # keeps its pixels when the file is closed


def image_shape(path: Path) -> tuple[int, int]:
    """(height, width) from the header. Raises `SampleError` where it cannot be read."""
    with _open(path) as image:
        return image.height, image.width


def _open(path: Path) -> Image.Image:
    """Read the header. Pillow, unlike cv2, notices truncation."""
    require_file(path, "an image")
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        problem = f"expected {PICTURES}, got something else or a destroyed header; copy it again"
        is_destroyed = (describe_content(path) or "") in READABLE
        raise (None if is_destroyed else foreign_file(path, PICTURES)) or SampleError(path, problem) from error
    except Image.DecompressionBombError as error:
        claimed = re.search(r"\d+", str(error))
        raise _too_large(path, f"{int(claimed[0]):,}" if claimed else "many more") from error
    except OSError as error:
        if error.errno is None:  # raised by Pillow itself, for a file cut within its header
            raise _damaged(path, error) from error
        raise SampleError(path, f"cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # decoders raise any type on foreign bytes
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> SampleError:
    problem = f"expected a whole image, got a truncated or damaged file ({problem_text(error)}); copy it again"
    return SampleError(path, problem)


def _load(path: Path, image: Image.Image) -> Image.Image:
    """Decode all pixels of an upright image."""
    try:
        _check_bytes(path, image)
        # TIFF is checked before decoding, as Pillow rotates it (uncompressed files wrongly). Other formats are checked
        # after: reading the EXIF data of a PNG reads the whole file.
        _refuse_rotated(path, getattr(image, "tag_v2", {}).get(ORIENTATION_TAG))
        image.load()
        _refuse_rotated(path, image.getexif().get(ORIENTATION_TAG))
        return _without_alpha(path, image)
    except SampleError:
        raise
    except Exception as error:  # as above, MemoryError included
        raise _damaged(path, error) from error


def _without_alpha(path: Path, image: Image.Image) -> Image.Image:
    """The decoded image without its alpha channel, or transparent colour, if no pixel is transparent."""
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return image
    image = image.convert("LA") if image.mode == "La" else image
    if image.mode.startswith(DEEP_MODES):
        is_opaque = not (np.asarray(image) == image.info["transparency"]).any()
    else:
        is_opaque = image.convert("RGBA").getchannel("A").getextrema()[0] == OPAQUE
    image.info.pop("transparency", None)
    if not is_opaque:
        raise SampleError(
            path, f"expected an image without transparency, got mode {image.mode} with alpha; save it as plain RGB"
        )
    return image.convert(ALPHA_MODES.get(image.mode, image.mode))


def _refuse_rotated(path: Path, orientation: object) -> None:
    if orientation not in (None, 0, 1):
        problem = f"expected pixels stored upright, got EXIF orientation {orientation}"
        raise SampleError(path, f"{problem}; rotate the pixels and clear the tag")


def _check_bytes(path: Path, image: Image.Image) -> None:
    """Faults that decoders ignore: wrong checksums, unreadable tags, a small JPEG file that takes hours to decode."""
    if image.format == "PNG":
        with Image.open(path, formats=("PNG",)) as copy:  # cannot be decoded once verified
            copy.verify()
    elif image.format == "TIFF":
        _check_tiff(path, image)
    elif image.format in ("JPEG", "MPO"):
        with path.open("rb") as file:
            scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
        if scans * image.width * image.height > MAX_SCANNED:
            raise SampleError(
                path,
                f"expected pixels times scans of at most {MAX_SCANNED:,}, got {scans} scans of "
                f"{image.width} x {image.height}; save it as baseline JPEG or PNG",
            )


def _check_tiff(path: Path, image: Image.Image) -> None:
    """Compare the tags in the file with those that Pillow read, and the tile size with the image's."""
    tags: Mapping[int, object] = getattr(image, "tag_v2", {})
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        # BigTIFF (version 43) has wider fields: offset of the directory, number of entries, (tag, type, count, value).
        big = 43 in (head[2], head[3])
        file.seek(struct.unpack_from(f"{order}Q" if big else f"{order}I", head, 8 if big else 4)[0])
        (count,) = struct.unpack(f"{order}Q" if big else f"{order}H", file.read(8 if big else 2))
        for _ in range(min(count, MAX_TAGS)):
            (tag,) = struct.unpack_from(f"{order}H", file.read(20 if big else 12))
            if tag in PIXEL_TAGS and tag not in tags:
                raise _damaged(path, f"tag {tag} cannot be read")
    width, height = (tags.get(tag, 0) for tag in TILE_TAGS)
    largest = max(SMALL_TILE, 2 * image.width * image.height)
    if isinstance(width, int) and isinstance(height, int) and width * height > largest:
        raise _damaged(path, f"tiles of {width} x {height} in an image of {image.width} x {image.height}")


def _refuse_unsuitable(path: Path, image: Image.Image, *, allow_deep_grey: bool = False) -> None:
    """Faults of images and masks that the header shows."""
    deep_grey = image.mode.startswith(DEEP_MODES)
    refuse_size(path, image.height, image.width)
    # An MPO file of a camera holds its image first, then previews.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise SampleError(path, "expected one image, got several pages or frames; store one a file")
    # Pillow silently reads 16-bit RGB as 8-bit; only the decoder's raw mode shows it.
    if not (deep_grey and allow_deep_grey) and (
        deep_grey or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    ):
        raise SampleError(
            path,
            f"expected 8 bits per channel, got 16 or more (mode {image.mode}); window or scale it to 8 bits yourself",
        )


def refuse_size(path: Path, height: int, width: int) -> None:
    """Refuse an image without pixels or with more than `MAX_PIXELS`. Raises `SampleError`."""
    if height < 1 or width < 1:
        raise SampleError(path, f"expected an image with pixels, got {width} x {height}; export it again")
    if height * width > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height}")


def _too_large(path: Path, actual: str) -> SampleError:
    problem = f"expected an image of sane size, at most {MAX_PIXELS:,} pixels, got {actual}; crop, tile or shrink it"
    return SampleError(path, problem)
