"""Wrong masks to plant in finished runs, for tests and experiments with the audit."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.ops import metrics
from kmine.types import IGNORE_INDEX

KINDS = ("shifted", "dilated", "swapped")
MAX_DICE = 0.7
"""Of a planted mask with the true one."""
Mask = NDArray[np.uint8]


def object_of(mask: Mask) -> NDArray[np.bool_]:
    """Foreground of any class, without ignored pixels."""
    return (mask != 0) & (mask != IGNORE_INDEX)


def shifted(mask: Mask, rng: np.random.Generator) -> Mask:
    """The mask moved by half of its width and height, in one of four directions."""
    rows, cols = np.nonzero((mask != 0) & (mask != IGNORE_INDEX))
    far = (np.array([np.ptp(rows), np.ptp(cols)]) + 1) // 2 * rng.choice([-1, 1], 2)
    move = np.array([[1, 0, far[1]], [0, 1, far[0]]], np.float32)
    return cv2.warpAffine(mask, move, mask.shape[::-1], flags=cv2.INTER_NEAREST)


def dilated(mask: Mask, rng: np.random.Generator) -> Mask:
    """The mask grown by half the radius of a disc of its area."""
    known = np.where(mask == IGNORE_INDEX, 0, mask).astype(np.uint8)
    radius = max(round(0.5 * float(np.sqrt((known != 0).sum() / np.pi))), 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.dilate(known, disc)


def planted(kind: str, mask: Mask, others: list[Mask], rng: np.random.Generator) -> Mask | None:
    """A wrong mask, or None if none of 20 draws differs enough."""
    for _ in range(20):
        if kind == "swapped":
            other = others[int(rng.integers(len(others)))]
            new = cv2.resize(other, mask.shape[::-1], interpolation=cv2.INTER_NEAREST)
        else:
            new = (shifted if kind == "shifted" else dilated)(mask, rng)
        shows = ((new != 0) & (new != IGNORE_INDEX)).any()
        if shows and metrics.dice(object_of(new), object_of(mask)) <= MAX_DICE:
            return new
    return None


def plant(masks: dict[str, Mask], share: float, rng: np.random.Generator) -> dict[str, tuple[str, Mask]]:
    """By sample id: kind of fault and planted mask, for a share of the masks that show an object."""
    names = [name for name in sorted(masks) if object_of(masks[name]).any()]
    drawn = rng.permutation(names)[: max(round(share * len(masks)), 1)]
    first = int(rng.integers(len(KINDS)))  # so that all kinds occur even where few masks are planted
    out: dict[str, tuple[str, Mask]] = {}
    for number, name in enumerate(drawn):
        for kind in (KINDS[(first + number + k) % len(KINDS)] for k in range(len(KINDS))):
            others = [masks[other] for other in names if other != name]
            new = planted(kind, masks[name], others, rng)
            if new is not None:
                out[str(name)] = (kind, new)
                break
    return out
