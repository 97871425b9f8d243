"""What a data set must offer, and the strict reading of image files that all of them share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kmine.records import SampleError, SampleRef, Skipped, UserError

ORIENTATION_TAG = 0x0112
PHOTOMETRIC_TAG, WHITE_IS_ZERO = 0x0106, 0
GREY_MODES = ("1", "L")
DEEP_MODES = ("I", "F")
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


class Source(Protocol):
    """A data set: an index built without reading a pixel, and readers for one sample at a time.

    Readers are called from several threads and, pickled, from other processes.
    """

    @property
    def name(self) -> str:
        """The name it has in the config."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id; 0 is "background"."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What the index left out, and why."""

    def refs(self) -> tuple[SampleRef, ...]:
        """Every sample, sorted by `sample_id`."""

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]. Raises `SampleError` for a damaged or unfit file."""

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids, of the image's size. Raises `SampleError` for a damaged, unfit or missing file."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) that changes when a setting, or any file's name, size or modification time does."""


def choose_task(asked: str, name: str, tasks: Sequence[str]) -> str:
    """The task that `data.task` asks of the data set `name`; "auto" is the first it has.

    Raises:
        UserError: for the task of another data set.
    """
    if asked != "auto" and asked not in tasks:
        raise UserError(f"data.task: expected auto or one of {', '.join(tasks)} for {name}, got {asked!r}")
    return tasks[0] if asked == "auto" else asked


def fingerprint_files(settings: Mapping[str, object], root: Path, files: Iterable[Path]) -> str:
    """SHA-256 (hex) over settings and, relative to `root`, the names, sizes and modification times of files."""
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    rows = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return hashlib.sha256(json.dumps([dict(settings), rows], sort_keys=True).encode()).hexdigest()


def read_rgb(path: Path, *, allow_grey: bool = False) -> NDArray[np.uint8]:
    """Read an 8-bit colour image whole, or say what is wrong with it.

    Args:
        path: of the file.
        allow_grey: whether a grey image is read, too, as three times the same; for modalities without colour.

    Returns:
        (H, W, 3) RGB, [0, 255].

    Raises:
        SampleError: for a missing, empty, truncated, foreign, too large, 16-bit, grey, transparent or rotated file.
    """
    with _open(path) as image:
        _refuse_unfit(path, image)
        if image.mode in GREY_MODES and allow_grey:
            return np.array(_load(path, image).convert("RGB"))
        if image.mode in GREY_MODES:
            raise SampleError(
                str(path), f"expected a colour image (RGB), got a grey one ({image.mode}); convert it to RGB"
            )
        if image.mode not in ("RGB", "P"):
            raise SampleError(str(path), f"expected an RGB image, got mode {image.mode}; convert it to 8-bit RGB")
        return np.array(_load(path, image).convert("RGB"))


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Read a mask file, stored grey or in colour, as grey values.

    Returns:
        (H, W), [0, 255].

    Raises:
        SampleError: for the same faults as `read_rgb`, grey apart.
    """
    with _open(path) as image:
        _refuse_unfit(path, image)
        if image.mode not in (*GREY_MODES, "RGB", "P"):
            raise SampleError(
                str(path), f"expected a grey or RGB mask, got mode {image.mode}; convert it to 8-bit grey"
            )
        return np.array(_load(path, image).convert("L"))


def read_stored(path: Path) -> Image.Image:
    """Decode a picture of one page as it is stored: 8 bits in any mode, or grey of more bits.

    Raises:
        SampleError: for a missing, empty, truncated, foreign, too large, transparent or rotated file, for more than 8
            bits a colour, for more than one page, and for more than 8 bits in which 0 is white.
    """
    with _open(path) as image:
        _refuse_unfit(path, image, allow_deep_grey=True)
        if (pages := getattr(image, "n_frames", 1)) != 1:
            raise SampleError(str(path), f"expected one picture, got {pages} pages or frames; store one a file")
        if image.mode.startswith(DEEP_MODES) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO:
            # Pillow inverts 8-bit files of this kind, and leaves deeper ones as they are.
            raise SampleError(str(path), "expected a TIFF file in which 0 is black, got 0 as white; invert it")
        return _load(path, image).copy()


def image_shape(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone. Raises `SampleError` where there is none."""
    with _open(path) as image:
        return image.height, image.width


def _open(path: Path) -> Image.Image:
    """Read the header. Pillow, because unlike cv2 it notices truncation and does not convert silently."""
    try:
        if path.stat().st_size == 0:
            raise SampleError(str(path), "expected an image, got an empty file (0 bytes); copy or download it again")
        return Image.open(path)
    except FileNotFoundError as error:
        raise SampleError(str(path), "expected an image, found no such file; check data.root") from error
    except UnidentifiedImageError as error:
        raise SampleError(
            str(path), "expected an image (JPEG or PNG), got something else or a destroyed header; copy it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except OSError as error:
        if error.errno is None:  # Pillow's own word for a file cut within its header
            raise _damaged(path, error) from error
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions") from error


def _damaged(path: Path, error: Exception) -> SampleError:
    return SampleError(
        str(path), f"expected a whole image, got a truncated or damaged file ({error}); copy or download it again"
    )


def _load(path: Path, image: Image.Image) -> Image.Image:
    """Decode whole, upright pixels."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise _damaged(path, error) from error
    # Only now: asking a PNG for EXIF reads all of it.
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    if orientation not in (0, 1):
        raise SampleError(
            str(path),
            f"expected pixels stored upright, got EXIF orientation {orientation}; rotate the pixels and clear the tag",
        )
    return image


def _refuse_unfit(path: Path, image: Image.Image, *, allow_deep_grey: bool = False) -> None:
    """Faults of colour and image files alike, seen in the header."""
    deep_grey = image.mode.startswith(DEEP_MODES)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(path, f"{image.width} x {image.height} pixels, limit {Image.MAX_IMAGE_PIXELS}")
    # Pillow reads 16-bit RGB as 8-bit without a word; only the raw mode of its decoder tells.
    if not (deep_grey and allow_deep_grey) and (
        deep_grey or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    ):
        raise SampleError(
            str(path),
            f"expected 8 bits per channel, got 16 or more (mode {image.mode}); window or scale it to 8 bits yourself",
        )
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        raise SampleError(
            str(path), f"expected an image without transparency, got mode {image.mode} with alpha; save it as plain RGB"
        )


def _too_large(path: Path, problem: str) -> SampleError:
    return SampleError(str(path), f"expected an image of sane size, got {problem}; crop or shrink it")
