"""A 64-bit perceptual hash that sees the picture and not the frame around it."""

from __future__ import annotations

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 128
SMALL = 64
"""Side in pixels of the small pictures of `hash_views`."""
DARK = 24
"""Grey values up to this belong to the black surround, also after JPEG ringing."""
MIN_BRIGHT = 0.2
"""Share of a row or column that must be brighter than `DARK` to count as picture."""
WINDOW = (0.33, 0.1, 0.9, 0.9)
"""Left, top, right, bottom of the hashed part, as shares of the picture.

Endoscopes write text and an inset into the left third and cut the corners. Hashed with those, different polyps
look alike and the same frame, re-encoded with another surround, looks different.
"""


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """Hash the picture inside its black surround, without the margins that devices draw on.

    Two encodings, sizes or brightnesses of one frame differ in few bits; compare by Hamming distance.

    Args:
        image: (H, W, 3) RGB, [0, 255].

    Returns:
        An unsigned 64-bit integer.
    """
    return int(str(imagehash.phash(_picture_crop(grey_of(image)))), 16)


def grey_of(image: NDArray[np.uint8]) -> Image.Image:
    """(H, W, 3) to grey, as mask files in colour are read, too."""
    return Image.fromarray(image).convert("L")


def hash_views(grey: Image.Image) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
    """The hash, and (SMALL, SMALL) squashed: the hashed part, and the whole image, to tell copies from lookalikes."""
    crop = _picture_crop(grey)
    small, whole = (
        cv2.resize(np.asarray(picture), (SMALL, SMALL), interpolation=cv2.INTER_AREA) for picture in (crop, grey)
    )
    return int(str(imagehash.phash(crop)), 16), np.asarray(small, np.uint8), np.asarray(whole, np.uint8)


def _picture_crop(grey: Image.Image) -> Image.Image:
    """The picture inside its surround, cut to `WINDOW`."""
    left, top, right, bottom = _picture_box(grey)
    width, height = right - left, bottom - top
    x0, y0, x1, y1 = WINDOW
    crop = grey.crop((left + int(x0 * width), top + int(y0 * height), left + int(x1 * width), top + int(y1 * height)))
    return crop if min(crop.size) >= 1 else grey


def _picture_box(grey: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is brighter than the surround; the whole image where that is little."""
    bright = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)) > DARK
    rows = np.flatnonzero(bright.mean(axis=1) > MIN_BRIGHT)
    cols = np.flatnonzero(bright.mean(axis=0) > MIN_BRIGHT)
    if len(rows) < THUMBNAIL // 4 or len(cols) < THUMBNAIL // 4:
        return 0, 0, *grey.size
    width, height = grey.size
    return (
        int(cols[0]) * width // THUMBNAIL,
        int(rows[0]) * height // THUMBNAIL,
        (int(cols[-1]) + 1) * width // THUMBNAIL,
        (int(rows[-1]) + 1) * height // THUMBNAIL,
    )
