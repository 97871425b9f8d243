"""What a data set must offer, and the strict reading of image files that all of them share."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kmine.errors import SampleError, UserError
from kmine.types import SampleRef, Skipped

MAX_PIXELS = 2**26
"""Of a picture, 8192 x 8192, or a slice: three times a mammogram. A header that claims more is damaged, or a trap."""
MAX_SCANNED = 2**31
"""Pixels times scans of a JPEG file, 32 scans of the largest: each passes over the whole picture. Usual are 10."""
FORMATS = ("PNG", "JPEG", "TIFF")
"""What Pillow may take a file for: it knows many more, some of which run other programs."""
BLOCK_BYTES = 2**20
"""Bytes read at once."""
MAX_TABLE = 2**26
"""Bytes of a CSV file: it is read line by line, but one without line ends is a single line."""
PNG_START = 8
ORIENTATION_TAG = 0x0112
PIXEL_TAGS = frozenset((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339))
"""Of TIFF: what pixels cannot be read without, where it is there; Pillow passes over those it cannot read."""
MAX_TAGS = 2**16
TILE_TAGS, SMALL_TILE = (322, 323), 2**22
"""Width and height of a tile; pixels of a tile that may be larger than its picture."""
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


def choose_task(requested: str, name: str, tasks: Sequence[str]) -> str:
    """The task that `data.task` asks of the data set `name`; "auto" is the first it has.

    Raises:
        UserError: for the task of another data set.
    """
    if requested != "auto" and requested not in tasks:
        raise UserError(f"data.task: expected auto or one of {', '.join(tasks)} for {name}, got {requested!r}")
    return tasks[0] if requested == "auto" else requested


def fingerprint_files(settings: Mapping[str, object], root: Path, files: Iterable[Path]) -> str:
    """SHA-256 (hex) over settings and, relative to `root`, the names, sizes and modification times of files."""
    rows = sorted((file.relative_to(root).as_posix(), *size_and_time(file)) for file in files)
    return hashlib.sha256(json.dumps([dict(settings), rows], sort_keys=True).encode()).hexdigest()


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and modification time in ns; (-1, -1) for a link to nothing and the like, of which its reader speaks."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def require_file(path: Path, expected: str) -> int:
    """Refuse what is no file with content before it is opened: who opens a pipe may wait for ever.

    Args:
        path: of the file.
        expected: what it should be, as in "an image".

    Returns:
        Its size in bytes.

    Raises:
        SampleError: for a missing or empty file, a link to nothing or itself, a folder, a pipe, socket or device.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        actual = "a link to nothing" if path.is_symlink() else "no such file"
        raise SampleError(str(path), f"expected {expected}, found {actual}; check the path, or data.root") from error
    except OSError as error:
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions and links") from error
    if not stat.S_ISREG(status.st_mode):
        actual = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise SampleError(str(path), f"expected {expected}, got {actual}; move it away, or put the file in its place")
    if status.st_size == 0:
        raise SampleError(str(path), f"expected {expected}, got an empty file (0 bytes); copy or download it again")
    return status.st_size


def require_table(path: Path, setting: str) -> None:
    """The same for the CSV file of a setting, of at most `MAX_TABLE` bytes. Raises `UserError`."""
    try:
        size = require_file(path, "a CSV file")
    except SampleError as error:
        raise UserError(f"{setting}: {error}") from error
    if size > MAX_TABLE:
        raise UserError(f"{setting}: {path}: expected a table of at most {MAX_TABLE:,} bytes, got {size:,}; split it")


def is_file(path: Path) -> bool:
    """Whether a file is there, no folder and no pipe; names that no file system takes are no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; names that no file system takes are no folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_rgb(path: Path, *, allow_grey: bool = False) -> NDArray[np.uint8]:
    """Read an 8-bit colour image whole, or say what is wrong with it.

    Args:
        path: of the file.
        allow_grey: whether a grey image is read, too, as three times the same; for modalities without colour.

    Returns:
        (H, W, 3) RGB, [0, 255].

    Raises:
        SampleError: for a missing, empty, truncated, foreign, too large, 16-bit, grey, transparent or rotated file,
            and for one of several pages.
    """
    with _open(path) as image:
        _refuse_unfit(path, image)
        if image.mode in GREY_MODES and allow_grey:
            return as_rgb(_load(path, image))
        if image.mode in GREY_MODES:
            raise SampleError(
                str(path), f"expected a colour image (RGB), got a grey one ({image.mode}); convert it to RGB"
            )
        if image.mode not in ("RGB", "P"):
            raise SampleError(str(path), f"expected an RGB image, got mode {image.mode}; convert it to 8-bit RGB")
        return as_rgb(_load(path, image))


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255], of a decoded picture; without Pillow's copy of what is RGB already."""
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


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
    require_file(path, "an image")
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise SampleError(
            str(path), "expected an image (PNG, JPEG or TIFF), got something else or a destroyed header; copy it again"
        ) from error
    except Image.DecompressionBombError as error:
        claimed = re.search(r"\d+", str(error))
        raise _too_large(path, f"{int(claimed[0]):,}" if claimed else "many more") from error
    except OSError as error:
        if error.errno is None:  # Pillow's own word for a file cut within its header
            raise _damaged(path, error) from error
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # what a decoder says of foreign bytes has no end
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> SampleError:
    return SampleError(
        str(path), f"expected a whole image, got a truncated or damaged file ({error}); copy or download it again"
    )


def _load(path: Path, image: Image.Image) -> Image.Image:
    """Decode whole, upright pixels."""
    try:
        _check_bytes(path, image)
        # Of TIFF before, as Pillow turns those itself (uncompressed ones wrongly); of others only after: asking a PNG
        # for EXIF reads all of it.
        _refuse_turned(path, getattr(image, "tag_v2", {}).get(ORIENTATION_TAG))
        image.load()
        _refuse_turned(path, image.getexif().get(ORIENTATION_TAG))
    except SampleError:
        raise
    except Exception as error:  # as above; MemoryError is among them
        raise _damaged(path, str(error) or type(error).__name__) from error
    return image


def _refuse_turned(path: Path, orientation: object) -> None:
    if orientation not in (None, 0, 1):
        raise SampleError(
            str(path),
            f"expected pixels stored upright, got EXIF orientation {orientation}; rotate the pixels and clear the tag",
        )


def _check_bytes(path: Path, image: Image.Image) -> None:
    """What decoders pass over: checksums, unreadable tags, and a JPEG that is small on disk and endless to decode."""
    if image.format == "PNG":
        _check_png(path)
    elif image.format == "TIFF":
        _check_tiff(path, image)
    elif image.format in ("JPEG", "MPO"):
        with path.open("rb") as file:
            scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
        if scans * image.width * image.height > MAX_SCANNED:
            raise SampleError(
                str(path),
                f"expected pixels times scans of at most {MAX_SCANNED:,}, got {scans} scans of "
                f"{image.width} x {image.height}; save it as baseline JPEG or PNG",
            )


def _check_png(path: Path) -> None:
    """Compare the checksums of all chunks that pixels depend on; Pillow skips those of pixels. Raises `SampleError`."""
    with path.open("rb") as file:
        file.seek(PNG_START)
        kind = b""
        while kind != b"IEND":
            head = file.read(8)
            if len(head) < 8:
                raise _damaged(path, "no end")
            left, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind[0] & 0x20:  # lower case: pixels do not depend on it
                file.seek(left + 4, 1)
                continue
            crc = zlib.crc32(kind)
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                crc, left = zlib.crc32(block, crc), left - len(block)
            if file.read(4) != crc.to_bytes(4, "big"):
                raise _damaged(path, f"wrong checksum of {kind.decode('latin-1')}")


def _check_tiff(path: Path, image: Image.Image) -> None:
    """Compare the directory with what Pillow found in it, and tiles with the picture. Raises `SampleError`."""
    tags: Mapping[int, object] = getattr(image, "tag_v2", {})
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        # BigTIFF has longer numbers: version 43, (offset of the directory), (its length), (tag, type, count, value)
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
        raise _damaged(path, f"tiles of {width} x {height} in a picture of {image.width} x {image.height}")


def _refuse_unfit(path: Path, image: Image.Image, *, allow_deep_grey: bool = False) -> None:
    """Faults of colour and image files alike, seen in the header."""
    deep_grey = image.mode.startswith(DEEP_MODES)
    refuse_size(path, image.height, image.width)
    # The first picture of a camera's MPO file is the picture.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise SampleError(str(path), "expected one picture, got several pages or frames; store one a file")
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


def refuse_size(path: Path, height: int, width: int) -> None:
    """Refuse a picture without pixels or of more than `MAX_PIXELS`. Raises `SampleError`."""
    if height < 1 or width < 1:
        raise SampleError(str(path), f"expected an image with pixels, got {width} x {height}; export it again")
    if height * width > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height}")


def _too_large(path: Path, actual: str) -> SampleError:
    return SampleError(
        str(path),
        f"expected an image of sane size, at most {MAX_PIXELS:,} pixels, got {actual}; crop, tile or shrink it",
    )
