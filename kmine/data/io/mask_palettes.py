"""Masks stored with a colour palette: a colour is the same class in every file, whatever its index there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine.errors import SampleError
from kmine.types import IGNORE_INDEX

Colours = tuple[tuple[int, int, int], ...]
"""RGB by index."""
BLACK = (0, 0, 0)


class MaskPalettes:
    """Palettes of the masks of a data set. The most common one decides which colour is which class id.

    Args:
        paths: masks, of which the headers are read at the first mask with a colour palette.
        first: palettes that decide instead, if it has any.
    """

    def __init__(self, paths: Iterable[Path] = (), first: MaskPalettes | None = None) -> None:
        self._paths, self._first = sorted(paths), first

    @cached_property
    def _files(self) -> dict[Colours, list[Path]]:
        found: dict[Colours, list[Path]] = defaultdict(list)
        for path in self._paths:
            if colours := _palette_of(path):
                found[colours].append(path)
        return dict(found)

    @cached_property
    def reference(self) -> Colours:
        """Colours by class id; empty where no mask has a colour palette. Shorter palettes may be its beginning."""
        if self._first is not None and self._first.reference:
            return self._first.reference
        begun_by = {c: sum(len(f) for o, f in self._files.items() if c[: len(o)] == o) for c in self._files}
        return max(begun_by, key=lambda colours: (begun_by[colours], len(colours)), default=())

    @property
    def differing(self) -> list[Path]:
        """Files whose palette is not the beginning of the reference."""
        return sorted(p for c, files in self._files.items() if self.reference[: len(c)] != c for p in files)

    def class_ids(self, path: Path, indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class ids of a mask with its (N, 3) palette. Raises `SampleError` for foreign colours, black as an object."""
        own: Colours = tuple(map(tuple, palette.tolist()))
        reference = self.reference or own
        table = np.zeros(256, np.uint8)
        for index in np.unique(indices).tolist():
            colour = own[index] if index < len(own) else None
            if colour is None or reference[index : index + 1] == (colour,):
                table[index] = index
            elif colour in reference:
                table[index] = reference.index(colour)
            else:
                raise SampleError(
                    path,
                    f"expected the colours of the other masks ({_listed(reference)}), got {colour}; store class ids as "
                    "a grey PNG",
                )
            if colour == BLACK and table[index] not in (0, IGNORE_INDEX):
                raise SampleError(
                    path,
                    f"expected black as the first colour of the palette (background), got it as colour {index}; store "
                    "class ids as a grey PNG",
                )
        return table[indices]

    def note(self, class_names: Sequence[str]) -> str:
        """How masks with other palettes are read; empty if there are none."""
        if not self.differing:
            return ""
        ids = ", ".join(f"{c} is {name}" for c, name in zip(self.reference, class_names, strict=False))
        return (
            f"{len(self.differing)} masks with another colour palette than the others; all are read by colour: {ids}; "
            "if that is wrong, store class ids as grey PNG"
        )


def is_grey(palette: NDArray[np.uint8]) -> bool:
    """Whether a palette of (N, 3) holds grey values only."""
    return bool((palette == palette[:, :1]).all())


def _palette_of(path: Path) -> Colours | None:
    """The colour palette in the header of a picture; None for other files, which their reader refuses."""
    if not path.is_file():  # opening a pipe may block for ever
        return None
    try:
        with Image.open(path, formats=("PNG", "TIFF", "BMP", "GIF")) as image:
            if image.mode != "P" or image.palette is None:
                return None
            raw_mode, data = image.palette.getdata()
            flat = np.frombuffer(data if raw_mode == "RGB" else bytes(image.getpalette("RGB") or ()), np.uint8)
    except Exception:  # decoders raise any type on foreign bytes
        return None
    palette = flat[: len(flat) // 3 * 3].reshape(-1, 3)
    return None if is_grey(palette) else tuple(map(tuple, palette.tolist()))


def _listed(colours: Colours) -> str:
    return ", ".join(map(str, colours[:6])) + (" and more" if len(colours) > 6 else "")
