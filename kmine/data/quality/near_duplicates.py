"""Search for near-duplicates: images with the same content, cropped, rescaled or recompressed.

N images, D = 2 * 16 * 16 values of the descriptor of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.quality.image_stats import FLAT, ImageStats
from kmine.data.splits import near_pairs
from kmine.io.threads import thread_pool

MAX_PAIRS = 30_000
"""Limit for the pairs that are aligned, the most similar first; one to two milliseconds each."""
SAME_PICTURE = 0.9
"""Similarity from which two images are duplicates; see experiments/data_doctor.

Of 600 copies (phantoms, Kvasir-SEG, X-rays; 2 or 4 % off each side or 4 % off two, saved as JPEG of quality 60) 598 had
.91 or more; the most similar of different images, X-ray phantoms, .87."""
DETAIL = 4.0
"""Sigma in pixels of the thumbnail of the blur that is subtracted, as all X-rays share coarse structure."""
BAND = (1.0, 3.0)
"""Sigmas of the band-pass of the descriptor, in pixels of half the thumbnail; robust to the shift of a crop."""
SIDE = 16
BLANK = 0.5
"""Standard deviation of grey values below which a thumbnail is blank."""
FLOOR = 0.7
"""Correlation of descriptors, of the part or the whole, from which a pair is a candidate."""
WORTH = 0.3
"""Correlation of the parts from which they are aligned."""
WHOLE_LESS = 0.05
"""Subtracted from the correlation of whole images, which share a frame."""
BLOCK = 500_000
"""Pairs per block: three arrays of 2 MB."""
SMOOTH, STEPS, PRECISION = 5, 30, 1e-4
MAX_SCALE, MAX_SHEAR, MAX_SHIFT = 1.18, 0.06, 12.0
"""Limits of a crop; an alignment beyond them is spurious. Shift in pixels of the thumbnail."""


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are duplicates, or near by hash."""

    first: str
    second: str
    bits: int
    """Hamming distance of the 64-bit hashes."""
    correlation: float
    """See `similarity`."""
    exact: bool
    """Whether all pixels are equal."""

    @property
    def same_picture(self) -> bool:
        """Whether the content is the same, not only the hash."""
        return self.exact or self.correlation >= SAME_PICTURE

    def __str__(self) -> str:
        return f"{self.first} = {self.second}"


@dataclass(frozen=True)
class DuplicateSearch:
    """Extent of a search for duplicates."""

    num_compared: int
    """Number of aligned pairs."""
    complete: bool
    """False where there were more candidates than the limit."""


def find_duplicates(
    stats: Sequence[ImageStats], groups: Mapping[str, str], distance: int
) -> tuple[list[DuplicatePair], DuplicateSearch]:
    """Find images of equal pixels, and similar images of different groups.

    Images of equal pixels are each paired with the first of them. Of the other pairs, at most `MAX_PAIRS` candidates
    are aligned. Duplicates among them are returned, and all pairs within `distance` bits, whatever their content. Blank
    images, such as the black end slices of volumes, are in no pair.

    Args:
        stats: statistics of all samples.
        groups: group id by sample id; similar images of one group are expected.
        distance: data.duplicate_distance; below 0 only equal pixels are searched for.
    """
    stats = [item for item in stats if item.contrast >= FLAT]
    first: dict[bytes, ImageStats] = {}
    exact = [
        DuplicatePair(first[item.fingerprint].sample_id, item.sample_id, 0, 1.0, exact=True)
        for item in stats
        if first.setdefault(item.fingerprint, item) is not item
    ]
    unique = list(first.values())
    if distance < 0 or len(unique) < 2:
        return exact, DuplicateSearch(0, complete=distance >= 0)
    group = np.unique([groups[item.sample_id] for item in unique], return_inverse=True)[1]
    words = np.array([item.image_hash for item in unique], dtype=np.uint64)
    descriptors = np.empty((len(unique), *compute_descriptor(unique[0].small, unique[0].whole).shape), np.float32)
    for n, item in enumerate(unique):
        descriptors[n] = compute_descriptor(item.small, item.whole)
    similar, all_similar = find_similar_pairs(descriptors, group, MAX_PAIRS)
    hashed, all_hashed = _near_hashes(words, group, distance)
    pairs = list(dict.fromkeys([*map(tuple, similar.tolist()), *hashed]))

    def compare(pair: tuple[int, int]) -> DuplicatePair:
        left, right = (unique[n] for n in pair)
        bits = (left.image_hash ^ right.image_hash).bit_count()
        correlation = similarity((left.small, left.whole), (right.small, right.whole), SAME_PICTURE)
        return DuplicatePair(left.sample_id, right.sample_id, bits, correlation, exact=False)

    with thread_pool() as threads:
        compared = list(threads.map(compare, pairs))
    near = [pair for pair in compared if pair.same_picture or pair.bits <= distance]
    return exact + near, DuplicateSearch(len(pairs), all_similar and all_hashed)


def _near_hashes(
    words: NDArray[np.uint64], group: NDArray[np.int64], distance: int
) -> tuple[list[tuple[int, int]], bool]:
    """At most `MAX_PAIRS` pairs within `distance` bits, and whether these are all."""
    pairs: list[tuple[int, int]] = []
    for rows, cols in near_pairs(words, distance):
        other = group[rows] != group[cols]
        pairs += zip(rows[other][:MAX_PAIRS].tolist(), cols[other][:MAX_PAIRS].tolist(), strict=True)
        if len(pairs) >= MAX_PAIRS:
            return pairs[:MAX_PAIRS], False
    return pairs, True


def compute_descriptor(part: NDArray[np.uint8], whole: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(2, D / 2), rows of norm 1, or 0 for a blank image; dot products are correlations."""
    return np.stack([_descriptor_of(part), _descriptor_of(whole)])


def _descriptor_of(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = cv2.resize(small, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if float(grey.std()) < BLANK:
        return np.zeros(SIDE * SIDE, np.float32)
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in BAND)
    band = cv2.resize(fine - coarse, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    band -= band.mean()
    return band / max(float(np.linalg.norm(band)), 1e-6)


def find_similar_pairs(
    descriptors: NDArray[np.float32], groups: NDArray[np.int64], most: int
) -> tuple[NDArray[np.intp], bool]:
    """Pairs of images of different groups with a correlation of at least `FLOOR`, and whether these are all.

    All pairs are compared in blocks of rows; memory is that of one block.

    Args:
        descriptors: (N, 2, D / 2).
        groups: (N,) group numbers.
        most: largest number of pairs; those of the highest correlation, mean of part and whole, are kept.

    Returns:
        (P, 2) indices, first < second, the most similar pairs first; False if there are more than `most`.
    """
    part, whole = descriptors[:, 0], descriptors[:, 1]  # views: BLAS accepts rows with a stride
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
    return np.stack([first[order], second[order]], axis=1), complete


def similarity(a: Sequence[NDArray[np.uint8]], b: Sequence[NDArray[np.uint8]], enough: float) -> float:
    """Similarity of two images, near 1 for copies: correlation of the aligned parts.

    If higher, the correlation of the aligned whole images minus `WHOLE_LESS`: a crop may change the detected surround
    and thus the part. `a` and `b` hold part and whole, (SMALL, SMALL) each. From a correlation of `enough` of the parts
    on, the whole images are not aligned.
    """
    in_part, in_whole = (compute_descriptor(*a) * compute_descriptor(*b)).sum(axis=1)
    parts = aligned_correlation(a[0], b[0]) if in_part >= WORTH else 0.0
    if parts >= enough or in_whole < FLOOR:
        return parts
    return max(parts, aligned_correlation(a[1], b[1]) - WHOLE_LESS)


def aligned_correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Correlation of the details of two thumbnails after the best affine alignment (ECC); 0 for a blank image."""
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
