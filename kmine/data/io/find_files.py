"""Folders of image files, and masks stored as pictures: what data sets of that kind share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.data.source import image_shape, read_grey
from kmine.errors import SampleError, UserError
from kmine.types import Skipped

SUFFIXES = (".jpg", ".jpeg", ".png")
KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
"""The suffixes as words."""
FOREGROUND_ABOVE = 127
"""A mask that once was a JPEG has compression rings around 0 and 255, so that only the middle separates."""
MAX_NAMED = 5
MAX_VISITS = 16
"""Ways to one folder, through links to folders, before these are taken for a tangle."""
UNWRITABLE = "expected a name in UTF-8, got other bytes; rename the file"


def index_images(folder: Path, on_error: Literal["stop", "skip"]) -> tuple[dict[str, Path], list[Skipped]]:
    """Image files by stem, and what else lies there; hidden files (`._a.jpg` of macOS) are nobody's data.

    Raises:
        UserError: for a folder that cannot be read, and for two files of one stem.
        SampleError: for a name that is not UTF-8, which no table could hold, if `on_error` is "stop".
    """
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from error
    paths: dict[str, Path] = {}
    strays = []
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            strays.append(Skipped(printable(path.stem), printable(path), f"not a {KINDS} file"))
        elif printable(path.name) != path.name:
            if on_error == "stop":
                raise SampleError(printable(path), UNWRITABLE)
            strays.append(Skipped(printable(path.stem), printable(path), UNWRITABLE))
        elif path.stem in paths:
            raise UserError(
                f"{folder}: expected one file a name, found {paths[path.stem].name} and {path.name}; remove one of them"
            )
        else:
            paths[path.stem] = path
    return paths, strays


def walk(root: Path, refuse: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders below `root`, itself first, each with the names of its folders (cut it to enter fewer) and files.

    Hidden ones (`._a.jpg` of macOS) are nobody's data. Links are followed, but none into a folder one is in already.

    Args:
        root: where to begin.
        refuse: is told of folders that cannot be read.

    Raises:
        UserError: for links that lead to one folder again and again.
    """
    inside: dict[str, tuple[tuple[int, int], ...]] = {}
    visits: Counter[tuple[int, int]] = Counter()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        try:
            status = Path(folder).stat()
        except OSError as error:
            refuse(error)
            continue
        inode, above = (status.st_dev, status.st_ino), inside.get(str(Path(folder).parent), ())
        if inode in above:
            folders.clear()
            continue
        inside[str(Path(folder))] = (*above, inode)
        visits[inode] += 1
        if visits[inode] > MAX_VISITS:
            raise UserError(f"{folder}: links to folders lead here again and again; remove links, or name a sub-folder")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield Path(folder), folders, [name for name in names if not name.startswith(".")]


def printable(path: Path | str) -> str:
    r"""A name that can be written anywhere: bytes that are no UTF-8 as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_foreground(path: Path, image: Path) -> NDArray[np.uint8]:
    """Read a mask of one class.

    Args:
        path: of the mask.
        image: the file it belongs to, whose size it must have.

    Returns:
        (H, W), 1 above `FOREGROUND_ABOVE` and 0 elsewhere; it may be all 0.

    Raises:
        SampleError: for the faults that `read_grey` names, another size, and foreground stored as 1.
    """
    grey, expected = read_grey(path), image_shape(image)
    if grey.shape != expected:
        raise SampleError(
            str(path),
            f"expected the image's size {_size(expected)}, got {_size(grey.shape)}; "
            "export the mask anew in the image's own size",
        )
    if grey.max() == 1:
        raise SampleError(str(path), "expected a mask of 0 and 255, got 0 and 1; store the foreground as 255 (not 1)")
    return (grey > FOREGROUND_ABOVE).astype(np.uint8)


def named(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    first, *rest = list(names)
    named, more = [first, *rest[: MAX_NAMED - 1]], len(rest) - MAX_NAMED + 1
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} (width x height)"
