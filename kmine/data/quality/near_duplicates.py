"""Do two images show the same picture, cropped, rescaled or recompressed? Which of many may, and which do.

Legend: N images, D = 2 * 16 * 16 numbers that describe one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

DETAIL = 4.0
"""Blur (sigma in pixels of the small picture) that is subtracted: what all X-rays share does not count."""
BAND = (1.0, 3.0)
"""Blurs between which a picture of half that side is described: crops, which move all of it a little, change little."""
SIDE = 16
BLANK = 0.5
"""Small pictures whose grey values vary less show nothing."""
FLOOR = 0.7
"""Pairs whose descriptions correlate less, in the part and in the whole, are not looked at."""
WORTH = 0.3
"""The parts of such a pair are aligned where they correlate so much."""
WHOLE_LESS = 0.05
"""Whole images share a frame, and so correlate more, copies or not."""
BLOCK = 500_000
"""Pairs looked at at a time: three arrays of 2 MB."""
SMOOTH, STEPS, PRECISION = 5, 30, 1e-4
MAX_SCALE, MAX_SHEAR, MAX_SHIFT = 1.18, 0.06, 12.0
"""What a crop may do to a picture; an alignment that asks for more has found something else. Shift in small pixels."""


@dataclass(frozen=True)
class SimilarPairs:
    """Pairs of images that may show the same."""

    pairs: NDArray[np.intp]
    """(P, 2), first below second, the most alike first."""
    complete: bool
    """False where there were more than could be taken."""


def compute_descriptor(part: NDArray[np.uint8], whole: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(2, D / 2), each half of length 1, or 0 for a blank: scalar products are correlations."""
    return np.stack([_descriptor_of(part), _descriptor_of(whole)])


def _descriptor_of(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = cv2.resize(small, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if float(grey.std()) < BLANK:
        return np.zeros(SIDE * SIDE, np.float32)
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in BAND)
    band = cv2.resize(fine - coarse, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    band -= band.mean()
    return band / max(float(np.linalg.norm(band)), 1e-6)


def find_similar_pairs(descriptions: NDArray[np.float32], groups: NDArray[np.int64], most: int) -> SimilarPairs:
    """Pairs of images of different groups whose descriptions correlate by `FLOOR` or more.

    All pairs are compared, a block of rows at a time; memory is that of one block.

    Args:
        descriptions: (N, 2, D / 2).
        groups: (N,).
        most: pairs to return at the most: those of the highest correlation, mean of part and whole.
    """
    part, whole = descriptions[:, 0], descriptions[:, 1]  # views: BLAS takes rows that lie apart
    count, least, complete = len(part), -2.0, True
    value, first, second = np.zeros(0, np.float32), np.zeros(0, np.intp), np.zeros(0, np.intp)
    start = 0
    while start < count - 1:
        stop = min(count, start + max(1, BLOCK // (count - start)))
        in_part, in_whole = part[start:stop] @ part[start:].T, whole[start:stop] @ whole[start:].T
        mean = (in_part + in_whole) / 2
        near = (np.maximum(in_part, in_whole, out=in_part) >= FLOOR) & (mean > least)
        near &= groups[start:stop, None] != groups[None, start:]
        near &= np.arange(stop - start)[:, None] < np.arange(count - start)[None, :]
        rows, cols = np.nonzero(near)
        value = np.concatenate([value, mean[rows, cols]])
        first, second = np.concatenate([first, rows + start]), np.concatenate([second, cols + start])
        if len(value) > most:
            best = np.argsort(-value, kind="stable")[:most]
            value, first, second = value[best], first[best], second[best]
            least, complete = float(value[-1]), False
        start = stop
    order = np.argsort(-value, kind="stable")
    return SimilarPairs(np.stack([first[order], second[order]], axis=1), complete)


def similarity(a: Sequence[NDArray[np.uint8]], b: Sequence[NDArray[np.uint8]], enough: float) -> float:
    """How much two images show the same, near 1 for copies: the correlation of their parts, aligned.

    Or that of the whole images less `WHOLE_LESS`, where it is higher: a crop can make the dark surround, and with it
    the part, come out otherwise.

    Args:
        a: part and whole of one image, (SMALL, SMALL) each.
        b: of the other.
        enough: a correlation of the parts that settles the matter.
    """
    in_part, in_whole = (compute_descriptor(*a) * compute_descriptor(*b)).sum(axis=1)
    parts = aligned_correlation(a[0], b[0]) if in_part >= WORTH else 0.0
    if parts >= enough or in_whole < FLOOR:
        return parts
    return max(parts, aligned_correlation(a[1], b[1]) - WHOLE_LESS)


def aligned_correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Correlation of the details of two small pictures where one is shifted and scaled as fits best; 0 for a blank."""
    detail_a, detail_b = _detail(a), _detail(b)
    if min(float(detail_a.std()), float(detail_b.std())) < BLANK:
        return 0.0
    warp = np.eye(2, 3, dtype=np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, STEPS, PRECISION)
    try:
        correlation, warp = cv2.findTransformECC(detail_a, detail_b, warp, cv2.MOTION_AFFINE, criteria, None, SMOOTH)  # type: ignore[call-overload]
    except cv2.error:  # it did not converge
        return 0.0
    scales, shears, shifts = np.diag(warp[:, :2]), (warp[0, 1], warp[1, 0]), warp[:, 2]
    fits = (scales > 1 / MAX_SCALE).all() and (scales < MAX_SCALE).all()
    fits = fits and np.abs(shears).max() < MAX_SHEAR and np.abs(shifts).max() < MAX_SHIFT
    return float(correlation) if fits and np.isfinite(correlation) else 0.0


def _detail(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = small.astype(np.float32)
    return grey - cv2.GaussianBlur(grey, (0, 0), DETAIL)
