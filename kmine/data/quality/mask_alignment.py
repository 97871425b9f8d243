"""Pairing of masks and images: compares mask outlines with the edges of their own and of other images.

N masks in the order of the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.types import IGNORE_INDEX, Finding

MIN_PAIRS, MIN_Z = 20, 2.0
"""Smallest number of pairs for the test, and smallest z of correctly paired masks."""
EDGE_SIDE = 128
"""Side in pixels at which outlines and edges are compared."""
CHANCE = 1e-3
"""Significance level of a run of shifted masks, per data set."""
MIN_RUN, MAX_RUNS = 8, 5
MIN_REST, REST_Z = 20, 3.0
"""Smallest number of masks outside a run, and smallest z of their pairing."""
MAX_RATIO = 1.5
"""Limit for the log ratio of two edge strengths, so that no single mask decides."""


@dataclass(frozen=True)
class MaskAlignment:
    """Edge strength along mask outlines on their own images and on all others."""

    num_pairs: int
    own: float
    """Mean gradient along the outline over the mean gradient of the image, on own images."""
    others: float
    """The same on all other images."""
    z: float
    """z of the difference, without image and mask effects; NaN with fewer than three pairs."""
    better_shift: int
    """If z is too small: -1 or 1 where masks fit the previous or next image better; else 0."""


@dataclass(frozen=True)
class AlignmentScore:
    """Edge strength along one outline on its own image and on the neighbouring files."""

    sample_id: str
    own: float
    """As in `MaskAlignment`."""
    before: float
    """On the previous image; NaN where there is none."""
    after: float


@dataclass(frozen=True)
class ShiftedRun:
    """Consecutive masks that fit the previous (-1) or next (1) image better than their own."""

    first: str
    last: str
    count: int
    shift: int


class NeighbourAlignment:
    """Scores each mask on its own image and its two neighbours in a stream of samples; holds three images."""

    def __init__(self) -> None:
        self._images: list[NDArray[np.float32] | None] = [None, None]
        self._held: tuple[str, NDArray[np.intp] | None] = ("", None)
        self.scores: list[AlignmentScore] = []

    def add(self, sample_id: str, image: NDArray[np.float32] | None, at: NDArray[np.intp] | None) -> None:
        """Add the next sample: `edges` of its image and `outline` of its mask, None where missing."""
        before, own = self._images
        held, outline_of_held = self._held
        if own is not None and outline_of_held is not None and len(outline_of_held):
            strengths = (_strength(picture, outline_of_held) for picture in (own, before, image))
            self.scores.append(AlignmentScore(held, *strengths))
        self._images, self._held = [own, image], (sample_id, at)

    def finish(self) -> list[AlignmentScore]:
        """Scores of all masks, in order, after the last sample."""
        self.add("", None, None)
        return self.scores


def _strength(image: NDArray[np.float32] | None, at: NDArray[np.intp]) -> float:
    return float("nan") if image is None else float(image.ravel()[at].mean())


def edges(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) -> (EDGE_SIDE, EDGE_SIDE): gradient magnitude of the resized grey image over its mean."""
    small = cv2.resize(image, (EDGE_SIDE, EDGE_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.0)
    size = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return size / max(float(size.mean()), 1e-6)


def outline(mask: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Flat indices, in the frame of `edges`, of the pixels along the outline of the foreground, without the rim."""
    inside = ((mask != 0) & (mask != IGNORE_INDEX)).astype(np.uint8)
    small = cv2.resize(inside, (EDGE_SIDE, EDGE_SIDE), interpolation=cv2.INTER_NEAREST_EXACT)
    band = cv2.morphologyEx(small, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    band[:2], band[-2:], band[:, :2], band[:, -2:] = 0, 0, 0, 0
    return np.flatnonzero(band)


def measure_alignment(images: Sequence[NDArray[np.float32]], outlines: Sequence[NDArray[np.intp]]) -> MaskAlignment:
    """Compare every outline with every image; pairs without an outline are left out.

    The reference is the mean over all other images, the limit of many random permutations. Image and mask means are
    subtracted, so that an image with many edges has no advantage.

    `images` are results of `edges`, `outlines` of `outline`, one per image, in the order of the files.
    """
    indices = [n for n, at in enumerate(outlines) if len(at)]
    count = len(indices)
    if count < 3:
        return MaskAlignment(count, float("nan"), float("nan"), float("nan"), 0)
    score = np.array([[images[i].ravel()[outlines[m]].mean() for m in indices] for i in indices])
    own = np.diag(score)
    others = (score.sum() - own.sum()) / (count * (count - 1))
    centred = score - score.mean(axis=0) - score.mean(axis=1)[:, None] + score.mean()
    z = _z(np.diag(centred))
    shifts = {shift: _z(np.diag(centred, -shift)) for shift in (-1, 1)}
    best = max(shifts, key=shifts.__getitem__)
    better = best if z < MIN_Z < shifts[best] else 0
    return MaskAlignment(count, float(own.mean()), float(others), z, better)


def _z(values: NDArray[np.float64]) -> float:
    return float(values.mean() / max(values.std(ddof=1) / np.sqrt(len(values)), 1e-12))


def find_shifted_runs(alignment_scores: Sequence[AlignmentScore]) -> list[ShiftedRun]:
    """Find runs of masks that are shifted by one file, in the order of the files.

    A mask that fits its neighbour's image better than its own scores above 0; the run of the highest sum is tested. For
    scores with a negative mean, a sum above x occurs by chance in at most n exp(-rate x) cases (Karlin and Altschul
    1990), with the rate of the scores outside the run.
    """
    runs: list[tuple[int, ShiftedRun]] = []
    free = np.ones(len(alignment_scores), bool)
    scores = {-1: _log_ratio(alignment_scores, "before"), 1: _log_ratio(alignment_scores, "after")}
    while len(runs) < MAX_RUNS:
        total, start, stop, shift = max((*_best_run(np.where(free, scores[side], -MAX_RATIO)), side) for side in scores)
        rest = free.copy()
        rest[start:stop] = False
        outside_scores = scores[shift][rest]
        if stop - start < MIN_RUN or len(outside_scores) < MIN_REST or -_z(outside_scores) < REST_Z:
            break
        if _rate(outside_scores) * total < np.log(len(alignment_scores) / CHANCE):
            break
        first, last = alignment_scores[start].sample_id, alignment_scores[stop - 1].sample_id
        runs.append((start, ShiftedRun(first, last, stop - start, shift)))
        free = rest
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


def _log_ratio(alignment_scores: Sequence[AlignmentScore], side: str) -> NDArray[np.float64]:
    """(N,) log ratio of the strength on the neighbour to that on the own image, clipped; 0 without a neighbour."""
    own, other = np.array([(fit.own, getattr(fit, side)) for fit in alignment_scores], float).reshape(-1, 2).T
    ratio = np.log(np.maximum(other, 1e-3) / np.maximum(own, 1e-3))
    return np.clip(np.nan_to_num(ratio, nan=0.0), -MAX_RATIO, MAX_RATIO)


def _best_run(scores: NDArray[np.float64]) -> tuple[float, int, int]:
    """Highest sum of consecutive scores, start and stop."""
    best, start, stop = 0.0, 0, 0
    total, begin = 0.0, 0
    for n, score in enumerate(scores.tolist()):
        if total <= 0:
            total, begin = 0.0, n
        total += score
        if total > best:
            best, start, stop = total, begin, n + 1
    return best, start, stop


def _rate(scores: NDArray[np.float64]) -> float:
    """The positive r with mean(exp(r * score)) = 1, by bisection; the mean of the scores is negative."""
    low, high = 0.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        if np.exp(middle * scores).mean() < 1:
            low = middle
        else:
            high = middle
    return low


def check_shifted_runs(runs: Sequence[ShiftedRun], alignment: MaskAlignment) -> list[Finding]:
    """Report shifted runs, unless `check_alignment` reports a shift of all masks."""
    if alignment.better_shift or not runs:
        return []
    which: Mapping[int, str] = {-1: "before", 1: "after"}
    texts = [
        f"the {run.count} masks from {run.first} to {run.last} fit the images one place {which[run.shift]} better"
        for run in runs
    ]
    names = tuple(name for run in runs for name in (run.first, run.last))
    text = f"{'; '.join(texts)} than their own; pair images and masks by name"
    return [Finding("pairing_part", "fault", text, names)]


def check_alignment(alignment: MaskAlignment) -> list[Finding]:
    """Report whether masks fit their own images better than others."""
    n, z = alignment.num_pairs, alignment.z
    if n < MIN_PAIRS:
        return [Finding("pairing_unknown", "note", f"{n} masks are too few to test whether they fit their images")]
    strengths = f"edge strength {alignment.own:.2f} on their own, {alignment.others:.2f} on others"
    figures = f"outlines on {n} images: {strengths}"
    if z >= MIN_Z:
        return [Finding("pairing", "note", f"masks follow their own images' edges: {figures} (z {z:.1f})")]
    shift = {0: "", -1: "; they fit the image one place before", 1: "; they fit the image one place after"}
    text = (
        f"masks fit their own images no better than others: {figures} (z {z:.1f}, expected {MIN_Z:g} or more)"
        f"{shift[alignment.better_shift]}; pair images and masks by name"
    )
    return [Finding("pairing", "fault", text)]
