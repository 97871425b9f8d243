"""Built-in data: procedural endoscopy, CT and chest X-ray images with exact masks, without files.

For demonstration and tests of the software, not models of a disease: scores on them do not carry over to patients.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kmine.config.data import PhantomKind
from kmine.data.datasets.phantom.ct import render_ct
from kmine.data.datasets.phantom.polyp import render_polyp
from kmine.data.datasets.phantom.xray import render_xray
from kmine.data.source import AXIAL_CT, CHEST_XRAY, ENDOSCOPY, IndexedSource, Symmetry
from kmine.errors import UserError
from kmine.types import SampleRef, Skipped

GENERATOR_VERSION = 1
"""Part of the fingerprint: increase it with any change of the images."""

_STREAM = 20_240_614
"""First word of the seed of every image, which separates it from the other generators of a run."""
_KINDS: dict[PhantomKind, int] = {"polyp": 0, "ct": 1, "xray": 2}
_OBJECT: dict[PhantomKind, str] = {"polyp": "polyp", "ct": "tumour", "xray": "infection"}
_LESION_SHARE: dict[PhantomKind, float] = {"polyp": 1.0, "ct": 0.6, "xray": 0.6}
_SYMMETRY: dict[PhantomKind, Symmetry] = {"polyp": ENDOSCOPY, "ct": AXIAL_CT, "xray": CHEST_XRAY}
_MIN_SIZE = 32


class PhantomSource(IndexedSource):
    """Procedural images, each determined by (kind, index, size)."""

    name = "phantom"

    def __init__(self, kind: PhantomKind, num_samples: int, size: int) -> None:
        """Index `num_samples` images of `size` x `size` pixels; none is rendered yet."""
        if kind not in _KINDS:
            raise UserError(f"data.kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        if num_samples < 1:
            raise UserError(f"data.num_samples: expected at least 1, got {num_samples}")
        if size < _MIN_SIZE:
            raise UserError(f"data.size: expected at least {_MIN_SIZE} pixels for the phantom, got {size}")
        self.kind, self.num_samples, self.size = kind, num_samples, size
        self.class_names, self.symmetry = ("background", _OBJECT[kind]), _SYMMETRY[kind]
        self.skipped: tuple[Skipped, ...] = ()
        words = f"{self.name} v{GENERATOR_VERSION} {kind} {num_samples} {size}"
        self._fingerprint = hashlib.sha256(words.encode()).hexdigest()

    def refs(self) -> tuple[SampleRef, ...]:
        """All samples, sorted by id; each is its own group."""
        ids = [f"{self.kind}_{index:06d}" for index in range(self.num_samples)]
        labels = [int(_begin(self.kind, index)[1]) for index in range(self.num_samples)]
        return tuple(SampleRef(i, group_id=i, image_label=label) for i, label in zip(ids, labels, strict=True))

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB, [0, 255]."""
        return _render(self.kind, self._index(sample_id), self.size)[0].copy()

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(S, S) uint8, 1 inside the object, else 0."""
        return _render(self.kind, self._index(sample_id), self.size)[1].copy()

    def _index(self, sample_id: str) -> int:
        kind, _, digits = sample_id.rpartition("_")
        if kind != self.kind or not digits.isdecimal() or int(digits) >= self.num_samples:
            raise KeyError(f"no sample {sample_id!r} among {self.num_samples} phantom images of kind {self.kind!r}")
        return int(digits)


def _begin(kind: PhantomKind, index: int) -> tuple[np.random.Generator, bool]:
    """Generator of an image, and whether the image holds a lesion (its first draw)."""
    rng = np.random.default_rng([_STREAM, _KINDS[kind], index])
    return rng, rng.random() < _LESION_SHARE[kind]


@lru_cache(maxsize=8)  # a few threads read image and mask in turn
def _render(kind: PhantomKind, index: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng, has_lesion = _begin(kind, index)
    if kind == "polyp":
        return render_polyp(rng, size)
    return render_ct(rng, size, has_lesion) if kind == "ct" else render_xray(rng, size, has_lesion)
