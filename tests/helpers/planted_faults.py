"""Wrong masks to plant in finished runs, for tests and experiments with the audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.ops import metrics
from kmine.ops.masks import components
from kmine.types import IGNORE_INDEX

Mask = NDArray[np.uint8]
"""(H, W) class ids, 255 for ignored pixels; a fault keeps the shape."""
Rng = np.random.Generator


def object_of(mask: Mask) -> NDArray[np.bool_]:
    """Foreground of any class, without ignored pixels."""
    return (mask != 0) & (mask != IGNORE_INDEX)


def likeness(a: Mask, b: Mask) -> float:
    """Mean Dice over the foreground classes of either mask; 1 without any."""
    classes = np.union1d(a[object_of(a)], b[object_of(b)])
    return float(np.mean([metrics.dice(a == k, b == k) for k in classes])) if len(classes) else 1.0


def shifted(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Moved by half of its width and height, in one of four directions."""
    rows, cols = np.nonzero(object_of(mask))
    far = (np.array([np.ptp(rows), np.ptp(cols)]) + 1) // 2 * rng.choice([-1, 1], 2)
    return _moved(mask, far)


def eroded(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Shrunk by half the radius of a disc of its area."""
    known = _known(mask)
    radius = max(round(0.5 * float(np.sqrt((known != 0).sum() / np.pi))), 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.erode(known, disc, borderValue=0)


def wrong_object(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """The same outline around another place, drawn at random."""
    return _moved(mask, (rng.uniform(-0.5, 0.5, 2) * mask.shape).astype(int))


def missing_object(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Without its largest object."""
    return np.where(components(object_of(mask), most=1)[0], 0, mask).astype(np.uint8)


def swapped_class(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Classes 1 and 2 exchanged."""
    return np.array([0, 2, 1, *range(3, 256)], np.uint8)[mask]


def neighbours(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """The mask of another image."""
    return cv2.resize(other, mask.shape[::-1], interpolation=cv2.INTER_NEAREST)


def flipped(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Mirrored left to right."""
    return np.ascontiguousarray(mask[:, ::-1])


def coarse_polygon(mask: Mask, other: Mask, rng: Rng) -> Mask:
    """Each object a polygon of at most four corners."""
    known = _known(mask)
    out = np.zeros_like(known)
    for contour in cv2.findContours(known, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        corners, tolerance = contour, 1.0
        while len(corners) > 4:
            corners, tolerance = cv2.approxPolyDP(contour, tolerance, closed=True), 1.2 * tolerance
        cv2.fillPoly(out, [corners], int(known[contour[0, 0, 1], contour[0, 0, 0]]))
    return out


FAULTS: dict[str, tuple[Callable[[Mask, Mask, Rng], Mask], float]] = {
    "shifted": (shifted, 0.7),
    "eroded": (eroded, 0.7),
    "wrong object": (wrong_object, 0.3),
    "missing object": (missing_object, 0.7),
    "swapped class": (swapped_class, 0.7),
    "neighbour's mask": (neighbours, 0.7),
    "flipped": (flipped, 0.7),
    "coarse polygon": (coarse_polygon, 0.9),
}
"""Kind -> how the mask is made from it, from another image's and a generator, and the most that it may be like it."""
KINDS = tuple(FAULTS)


def planted(kind: str, mask: Mask, others: Sequence[Mask], rng: Rng) -> Mask | None:
    """A wrong mask, or None if none of 20 draws differs enough."""
    make, most = FAULTS[kind]
    for _ in range(20):
        new = make(mask, others[int(rng.integers(len(others)))], rng)
        shows = object_of(new).any() or kind == "missing object"
        if shows and likeness(new, mask) <= most:
            return new
    return None


def plant(masks: dict[str, Mask], share: float, rng: Rng, kinds: Sequence[str] = KINDS) -> dict[str, tuple[str, Mask]]:
    """By sample id: kind of fault and planted mask, for a share of the masks that show an object."""
    names = [name for name in sorted(masks) if object_of(masks[name]).any()]
    drawn = rng.permutation(names)[: max(round(share * len(masks)), 1)]
    first = int(rng.integers(len(kinds)))  # so that all kinds occur even where few masks are planted
    out: dict[str, tuple[str, Mask]] = {}
    for number, name in enumerate(drawn):
        for kind in (kinds[(first + number + k) % len(kinds)] for k in range(len(kinds))):
            new = planted(kind, masks[name], [masks[other] for other in names if other != name], rng)
            if new is not None:
                out[str(name)] = (kind, new)
                break
    return out


def _moved(mask: Mask, by: NDArray[np.integer]) -> Mask:
    move = np.array([[1, 0, by[1]], [0, 1, by[0]]], np.float32)
    return cv2.warpAffine(mask, move, mask.shape[::-1], flags=cv2.INTER_NEAREST)


def _known(mask: Mask) -> Mask:
    return np.where(mask == IGNORE_INDEX, 0, mask).astype(np.uint8)
