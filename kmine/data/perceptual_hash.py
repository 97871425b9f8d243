"""A 64-bit perceptual hash of an image without its black surround."""

from __future__ import annotations

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 128
SMALL = 64
"""Side in pixels of the thumbnails of `hash_views`."""
DARK = 24
"""Largest grey value of the black surround, JPEG ringing included."""
MIN_BRIGHT = 0.2
"""Share of a row or column brighter than `DARK` from which it is content."""
BLANK = (0, 1 << 63)
"""Hashes of equal values: of black, and of another one, which has the bit of the mean."""
WINDOW = (0.33, 0.1, 0.9, 0.9)
"""Left, top, right, bottom of the hashed part, as shares of the content.

Endoscopes draw text and an inset into the left third and cut the corners. Hashed with those, images of different polyps
are close, and re-encoded copies with another surround are not.
"""


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """Hash the content inside the black surround, without the margins that devices draw on.

    From (H, W, 3) RGB, [0, 255], to an unsigned 64-bit integer. Encodings, sizes and brightnesses of one image differ
    in few bits; compare by Hamming distance.
    """
    return int(str(imagehash.phash(_picture_crop(grey_of(image)))), 16)


def grey_of(image: NDArray[np.uint8]) -> Image.Image:
    """(H, W, 3) RGB to grey, as for mask files in colour."""
    return Image.fromarray(image).convert("L")


def hash_views(grey: Image.Image) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
    """The hash, and thumbnails (SMALL, SMALL) of the hashed part and of the whole image, to verify copies."""
    crop = _picture_crop(grey)
    small, whole = (cv2.resize(np.asarray(p), (SMALL, SMALL), interpolation=cv2.INTER_AREA) for p in (crop, grey))
    return int(str(imagehash.phash(crop)), 16), np.asarray(small, np.uint8), np.asarray(whole, np.uint8)


def _picture_crop(grey: Image.Image) -> Image.Image:
    """The content inside the surround, cropped to `WINDOW`."""
    left, top, right, bottom = _picture_box(grey)
    width, height = right - left, bottom - top
    x0, y0, x1, y1 = WINDOW
    crop = grey.crop((left + int(x0 * width), top + int(y0 * height), left + int(x1 * width), top + int(y1 * height)))
    return crop if min(crop.size) >= 1 else grey


def _picture_box(grey: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the content; the whole image where the content is small."""
    bright = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)) > DARK
    rows = np.flatnonzero(bright.mean(axis=1) > MIN_BRIGHT)
    cols = np.flatnonzero(bright.mean(axis=0) > MIN_BRIGHT)
    if len(rows) < THUMBNAIL // 4 or len(cols) < THUMBNAIL // 4:
        return 0, 0, *grey.size
    (x0, x1), (y0, y1) = (((int(n[0]), int(n[-1]) + 1)) for n in (cols, rows))
    width, height = grey.size
    return x0 * width // THUMBNAIL, y0 * height // THUMBNAIL, x1 * width // THUMBNAIL, y1 * height // THUMBNAIL
