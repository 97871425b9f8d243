"""Mask arithmetic: components, boxes, points, votes, lossless run lengths.

Letters: H, W height and width, M masks. Masks are (H, W) bool unless noted otherwise. Boxes are XYXY in pixels with
both ends inclusive, as in segment-anything: one pixel at row 3, column 4 has the tight box (4, 3, 4, 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kmine.types import Bool

Box = NDArray[np.float32]
MAX_OUTLINE = 2**22
"""Longest outline of a polygon in pixels; filling takes memory in proportion."""
MAX_MOVE = 20 / 1024
"""Largest jitter of an edge in SAM's training, as a share of the image's long side."""


def window(*masks: Bool | None) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around all (H, W) masks, those that are not None; empty without a pixel."""
    boxes = np.array([cv2.boundingRect(mask.view(np.uint8)) for mask in masks if mask is not None]).reshape(-1, 4)
    boxes = boxes[boxes[:, 2] > 0]
    if not len(boxes):
        return slice(0, 0), slice(0, 0)
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    return slice(int(y0), int(y1)), slice(int(x0), int(x1))


def components(mask: Bool, min_area: int = 1, most: int | None = None) -> list[Bool]:
    """8-connected components of at least `min_area` pixels, at most `most`, largest first (ties: top to bottom)."""
    rows, cols = window(mask)
    # OpenCV numbers components by blocks of 2 x 2 pixels: those of the whole mask.
    top, left = rows.start // 2 * 2, cols.start // 2 * 2
    if rows.start == rows.stop:
        return []
    content = mask[top : rows.stop, left : cols.stop].view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(content, connectivity=8)
    numbers = sorted(range(1, len(stats)), key=lambda i: (-int(stats[i, cv2.CC_STAT_AREA]), i))
    out = []
    for number in (i for i in numbers[:most] if stats[i, cv2.CC_STAT_AREA] >= min_area):
        x, y, width, height = map(int, stats[number, :4])
        component = np.zeros(mask.shape, np.bool_)
        inside = labels[y : y + height, x : x + width] == number
        component[top + y : top + y + height, left + x : left + x + width] = inside
        out.append(component)
    return out


def tight_box(mask: Bool) -> Box:
    """(4,) XYXY of a mask, ends inclusive. Raises `ValueError` for an empty mask."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("tight_box: expected a mask with foreground, got an empty one")
    return np.array([cols[0], rows[0], cols[-1], rows[-1]], np.float32)


def clip_box(box: Box, height: int, width: int) -> Box:
    """(..., 4) XYXY limited to the image, ends inclusive."""
    limit = np.array([width - 1, height - 1, width - 1, height - 1], np.float32)
    return np.clip(box, 0, limit).astype(np.float32)


def grow_box(box: Box, share: float, height: int, width: int, min_px: float = 2.0) -> Box:
    """Grow a box on every side by `share` of that side's length, at least `min_px`; clip it to the image."""
    dx, dy = (max(share * float(side), min_px) for side in box[2:] - box[:2])
    return clip_box(box + np.array([-dx, -dy, dx, dy], np.float32), height, width)


def jitter_boxes(
    box: Box, count: int, share: float, height: int, width: int, rng: np.random.Generator, *, max_move: float = MAX_MOVE
) -> Box:
    """(count, 4): the box with each edge moved uniformly by up to `share` of its side.

    A move is at most `max_move` of the image's long side; with `share` below 0.5 no edge passes the box's centre.
    """
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2, np.float32)
    reach = np.minimum(sides * share, max_move * max(height, width))
    return clip_box(box + rng.uniform(-1, 1, (count, 4)).astype(np.float32) * reach, height, width)


def squared_depth(mask: Bool) -> NDArray[np.int64]:
    """(H, W): squared distance in pixels of each set pixel to the nearest unset one, 0 for unset pixels.

    Squared distances of pixels are whole numbers, so they are rounded: the last bits of OpenCV's distances differ from
    call to call, and a maximum among equal distances would be another pixel each time. Exact up to 2000 pixels.
    """
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.rint(depth.astype(np.float64) ** 2).astype(np.int64)


def inner_point(mask: Bool) -> NDArray[np.float32]:
    """(2,) as (x, y): the pixel deepest inside the mask; of several the first, row by row.

    The image is padded with zeros first, so that an object cut by the border is deepest away from it. The centroid is
    no alternative: that of a crescent lies outside.
    """
    rows, cols = window(mask)
    depth = squared_depth(np.pad(mask[rows, cols], 1))[1:-1, 1:-1]
    row, col = np.unravel_index(int(depth.argmax()), depth.shape)
    return np.array([cols.start + col, rows.start + row], np.float32)


def outer_point(mask: Bool, box: Box, min_px: float = 3.0) -> NDArray[np.float32] | None:
    """(2,) as (x, y): the background pixel in the box farthest from the mask; None if nearer than `min_px`."""
    x0, y0, x1, y1 = (int(v) for v in (np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3])))
    rows, cols = window(mask)
    top, left = min(y0, rows.start), min(x0, cols.start)
    depth = squared_depth(~mask[top : max(y1 + 1, rows.stop), left : max(x1 + 1, cols.stop)])
    depth = depth[y0 - top : y1 + 1 - top, x0 - left : x1 + 1 - left]
    if depth.size == 0 or depth.max() < min_px**2:
        return None
    row, col = np.unravel_index(int(depth.argmax()), depth.shape)
    return np.array([x0 + col, y0 + row], np.float32)


def vote(masks: Bool, min_vote: float) -> NDArray[np.int8]:
    """(H, W): 1 where at least a share `min_vote` of the (M, H, W) masks is set, 0 where as many are unset, else -1."""
    share = np.arange(len(masks) + 1) / len(masks)
    by_count = np.full(len(share), -1, np.int8)
    by_count[share >= min_vote - 1e-9] = 1
    by_count[share <= 1 - min_vote + 1e-9] = 0
    return by_count[masks.view(np.uint8).sum(axis=0, dtype=np.uint16)]


def to_rle(mask: Bool) -> str:
    """Encode as COCO's compressed run lengths (column-major, lossless), as text."""
    from pycocotools import mask as coco

    (height, width), (_, cols) = mask.shape, window(mask)
    if not cols.stop:
        cols = slice(0, 1)
    inside = coco.encode(np.asfortranarray(mask[:, cols], dtype=np.uint8))["counts"].decode("ascii")
    # The columns without a pixel need not be transposed: they lengthen the first and the last run.
    before, after = cols.start * height, (width - cols.stop) * height
    lengths = run_lengths(inside).tolist()
    lengths[0] += before
    if len(lengths) % 2:
        lengths[-1] += after
    elif after:
        lengths.append(after)
    return coco.frPyObjects({"counts": lengths, "size": [height, width]}, height, width)["counts"].decode("ascii")


def from_rle(counts: str, height: int, width: int) -> Bool:
    """Decode text of `to_rle` to a (height, width) mask. Raises `ValueError` for other text or another size."""
    return from_runs(run_lengths(counts), height, width)


def run_lengths(counts: str) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed text, 5 bits a character. Raises `ValueError` for other or cut text."""
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("expected compressed run lengths, got other or cut text")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.append(0, ends[:-1] + 1)
    place = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:
        raise ValueError("expected compressed run lengths, got a length of more than 35 bits")
    values = np.add.reduceat((codes & 31) << 5 * place, starts)
    values -= np.where(codes[ends] & 16, 1 << 5 * (place[ends] + 1), 0)  # two's complement
    for first in (1, 2):  # from the fourth on, each is the difference from the length before the last
        values[first::2] = np.cumsum(values[first::2])
    return values


def from_runs(lengths: ArrayLike, height: int, width: int) -> Bool:
    """Decode run lengths, column-major, unset first, to a mask. Raises `ValueError` for another sum than its pixels."""
    runs = np.asarray(lengths)
    if runs.ndim != 1 or (runs < 0).any() or runs.max(initial=0) > height * width or runs.sum() != height * width:
        total = runs.sum() if runs.ndim == 1 else "a nested list"
        raise ValueError(f"expected run lengths of {height} x {width} = {height * width} pixels in all, got {total}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64)).reshape((height, width), order="F")


def fill_polygon(points: ArrayLike, height: int, width: int) -> Bool:
    """(height, width) mask of the pixels in a polygon of (N, 2) points (x, y), as COCO's tools fill it.

    Raises:
        ValueError: fewer than three points, points far outside, an outline of more than `MAX_OUTLINE` pixels.
    """
    from pycocotools import mask as coco

    corners = np.asarray(points, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise ValueError(f"expected a polygon of at least 3 points (x, y), got {len(corners)}")
    limit = np.array([width, height])
    if not ((corners >= -limit) & (corners <= 2 * limit)).all():
        raise ValueError(
            f"expected points in the image of {width} x {height}, got {corners.min():g} to {corners.max():g}"
        )
    if np.abs(np.diff(corners, axis=0, append=corners[:1])).sum() > MAX_OUTLINE:
        raise ValueError(f"expected an outline of at most {MAX_OUTLINE:,} pixels, got a longer one")
    return coco.decode(coco.frPyObjects([corners.ravel().tolist()], height, width))[..., 0].astype(bool)


def fill_ellipse(centre: Sequence[float], radii: Sequence[float], degrees: float, height: int, width: int) -> Bool:
    """(height, width) mask of the pixels whose centre is in an ellipse; all (x, y) in pixels, turned clockwise."""
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    angle = np.deg2rad(degrees)
    along = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
    across = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
    return (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1
