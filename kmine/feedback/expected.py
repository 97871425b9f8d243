"""What a run expects of corrected masks: its images by every name they may have, their sizes and classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError, first_names
from kmine.io.files import read_png, safe_name
from kmine.io.json_file import json_field
from kmine.types import IGNORE_INDEX

Mask = NDArray[np.uint8]
IGNORED = "ignored"
"""Class name of ignored pixels in COCO and in Label Studio."""
CURE = "export it again"
Volumes = Callable[[str, Path], Iterator[tuple[str, Mask]] | None]
"""(name, path of a volume's mask file) -> sample ids and masks of its slices; None for an unknown volume."""


@dataclass(frozen=True)
class ExpectedMasks:
    """The images of a run, and what a corrected mask of each must look like."""

    shapes: Mapping[str, tuple[int, int]]
    """(H, W) by sample id."""
    class_names: Sequence[str]
    """By class id, background first."""
    volumes: Volumes = lambda name, path: None
    pictures: Callable[[Sequence[Path]], Callable[[Path], Mask]] = lambda paths: read_png
    """Picture files of masks -> reader of the class ids of one of them."""

    def check(self, where: str, sample_id: str, mask: Mask) -> tuple[str, Mask]:
        """Return `(sample_id, mask)`; `where` opens the message. Raises `UserError` for another size or unknown ids."""
        self.check_size(where, sample_id, *mask.shape)
        foreign = sorted(set(np.unique(mask).tolist()) - {*range(len(self.class_names)), IGNORE_INDEX})
        if foreign:
            raise UserError(
                f"{where}: expected the class ids 0 to {len(self.class_names) - 1} and {IGNORE_INDEX} (ignored) for "
                f"{sample_id}, got {first_names([*map(str, foreign)])}; map them to these"
            )
        return sample_id, mask

    def check_size(self, where: str, sample_id: str, height: int, width: int) -> None:
        """Raise `UserError` where a mask has another size than its image."""
        expected = self.shapes[sample_id]
        if (height, width) != expected:
            sizes = [f"{size[1]} x {size[0]}" for size in (expected, (height, width))]
            raise UserError(
                f"{where}: expected a mask of {sizes[0]} (width x height) for {sample_id}, got {sizes[1]}; export it "
                "in the image's own size"
            )

    @cached_property
    def names(self) -> dict[str, str]:
        """Sample ids by every name that a returned file may have."""
        return {name(i): i for name in (picture_name, safe_name, str) for i in self.shapes}

    def sample_id(self, entry: Mapping[str, Any], file_key: str, where: str) -> str | None:
        """Sample that an entry of a file names by `sample_id` or by a file name; None if the run lacks it."""
        stored = json_field(entry, "sample_id", str, int, type(None), where=where, cure=CURE)
        if stored is not None:
            return self.names.get(str(stored))
        path = Path(json_field(entry, file_key, str, type(None), where=where, cure=CURE) or "?")
        return next(
            (self.names[n] for n in (str(path.parent / path.stem), path.stem, path.name) if n in self.names), None
        )

    def class_ids(self, where: str, names: Mapping[Any, str]) -> dict[Any, int]:
        """Class ids of class names. Raises `UserError` for a name that is no class."""
        own = {name: n for n, name in enumerate(self.class_names) if n} | {IGNORED: IGNORE_INDEX}
        foreign = [name for name in names.values() if name not in own]
        if foreign:
            raise UserError(f"{where}: expected the classes {', '.join(own)}, got {foreign[0][:60]!r}; rename it")
        return {key: own[name] for key, name in names.items()}


def picture_name(sample_id: str) -> str:
    """File name, without suffix, of a sample's picture; the same in a path and in a URL."""
    name = safe_name(sample_id)
    suffix = f"-{hashlib.sha256(sample_id.encode()).hexdigest()[:8]}" if "%" in name else ""
    return name.replace("%", "_") + suffix


def refuse_unknown(where: Path, names: Sequence[str]) -> None:
    """Raise `UserError` for masks of images that the run does not have."""
    if names:
        raise UserError(
            f"{where}: expected masks of this run's images, got {first_names([n[:200] for n in names])}, which it does "
            "not have; name files as kmine.audit --export masks does, or remove the others"
        )


def refuse_duplicates(where: Path, names: Iterable[str | None], expected: str) -> None:
    """Raise `UserError` for a name that occurs twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: expected {expected}, got two for {twice[0]}; remove one")
