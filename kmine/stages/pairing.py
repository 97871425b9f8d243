"""Do masks belong to their images? Outlines held against the edges of one's own image and of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.records import IGNORE_INDEX, Finding

MIN_PAIRS, MIN_Z = 20, 2.0
"""Masks that belong to their images must say so with this z, asked of at least so many pairs."""
EDGE_SIDE = 128
"""Side in pixels at which mask outlines are held against image edges."""


@dataclass(frozen=True)
class Pairing:
    """How much better mask outlines follow the edges of their own image than those of the other images."""

    num_pairs: int
    own: float
    """Mean gradient along the outline over the image's mean gradient, masks on their own image."""
    others: float
    """The same on all other images."""
    z: float
    """Of the difference, image and mask effects taken out; NaN with fewer than two pairs."""
    better_shift: int
    """Where z is too small: -1 or 1 if masks fit the image one place before or after better; else 0."""


def edges(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) to (EDGE_SIDE, EDGE_SIDE): gradient magnitude of the squashed grey image over its mean."""
    small = cv2.resize(image, (EDGE_SIDE, EDGE_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.0)
    size = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return size / max(float(size.mean()), 1e-6)


def outline(mask: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Flat indices, in the frame of `edges`, of the pixels beside the outline of the foreground; none on the rim."""
    inside = ((mask != 0) & (mask != IGNORE_INDEX)).astype(np.uint8)
    small = cv2.resize(inside, (EDGE_SIDE, EDGE_SIDE), interpolation=cv2.INTER_NEAREST_EXACT)
    band = cv2.morphologyEx(small, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    band[:2], band[-2:], band[:, :2], band[:, -2:] = 0, 0, 0, 0
    return np.flatnonzero(band)


def measure_pairing(images: Sequence[NDArray[np.float32]], outlines: Sequence[NDArray[np.intp]]) -> Pairing:
    """Hold every outline against every image; only those with an outline count.

    The alternative to the true pairing is the mean over all other images, which is what many random permutations
    would come to; the means of each image and of each mask are taken out, so that a busy image helps nobody.

    Args:
        images: as `edges` returns them, in the order of the files.
        outlines: as `outline` returns them, one an image.
    """
    which = [n for n, at in enumerate(outlines) if len(at)]
    count = len(which)
    if count < 3:
        return Pairing(count, float("nan"), float("nan"), float("nan"), 0)
    score = np.array([[images[i].ravel()[outlines[m]].mean() for m in which] for i in which])
    own = np.diag(score)
    others = (score.sum() - own.sum()) / (count * (count - 1))
    centred = score - score.mean(axis=0) - score.mean(axis=1)[:, None] + score.mean()
    z = _z(np.diag(centred))
    shifts = {shift: _z(np.diag(centred, -shift)) for shift in (-1, 1)}
    best = max(shifts, key=shifts.__getitem__)
    better = best if z < MIN_Z < shifts[best] else 0
    return Pairing(count, float(own.mean()), float(others), z, better)


def _z(values: NDArray[np.float64]) -> float:
    return float(values.mean() / max(values.std(ddof=1) / np.sqrt(len(values)), 1e-12))


def examine_pairing(pairing: Pairing) -> list[Finding]:
    """Whether masks belong to their images more than to others."""
    n, z = pairing.num_pairs, pairing.z
    if n < MIN_PAIRS:
        return [
            Finding("pairing_unknown", "note", f"{n} masks are too few to tell whether they belong to their images")
        ]
    figures = f"outlines on {n} images: edge strength {pairing.own:.2f} on their own, {pairing.others:.2f} on others"
    if z >= MIN_Z:
        return [Finding("pairing", "note", f"masks follow their own images' edges: {figures} (z {z:.1f})")]
    shift = {0: "", -1: "; they fit the image one place before", 1: "; they fit the image one place after"}
    return [
        Finding(
            "pairing",
            "fault",
            f"masks fit their own images no better than others: {figures} (z {z:.1f}, expected {MIN_Z:g} or more)"
            f"{shift[pairing.better_shift]}; pair images and masks by name",
        )
    ]
