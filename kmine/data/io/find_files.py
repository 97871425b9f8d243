"""Search of folders: image files by stem, folder trees with links, names in any encoding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from kmine.data.source import OnError
from kmine.errors import SampleError, UserError, first_names
from kmine.types import Skipped

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff")
KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
"""The suffixes, for messages."""
MAX_NAMED = 5
MAX_VISITS = 16
"""Limit for the number of paths, through links, to one folder."""
UNWRITABLE = "expected a name in UTF-8, got other bytes; rename the file"


def refuse_folder(error: OSError) -> NoReturn:
    """Raise the `UserError` for a folder that cannot be read."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror or error}); check its permissions") from error


def index_images(folder: Path, on_error: OnError) -> tuple[dict[str, Path], list[Skipped]]:
    """Image files by stem, and all other files; hidden files (`._a.jpg` of macOS) are ignored.

    Raises:
        UserError: for a folder that cannot be read, and for two files of one stem.
        SampleError: for a name that is not UTF-8, which no table could store, if `on_error` is "stop".
    """
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        refuse_folder(error)
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


def drop_orphans(masks: dict[str, Path], images: Mapping[str, Path], place: str, on_error: OnError) -> list[Skipped]:
    """Remove masks without an image, a sign of lost or renamed files; `place` begins the `UserError` of "stop"."""
    orphans = sorted(masks.keys() - images.keys())
    if orphans and on_error == "stop":
        raise UserError(
            f"{place}: expected an image for each mask, found none for {named(str(masks[name]) for name in orphans)}; "
            "restore the images, or pass --data.on_error skip to leave these masks out"
        )
    return [Skipped(name, str(masks.pop(name)), "a mask without an image") for name in orphans]


def walk(root: Path, refuse: Callable[[OSError], None] = refuse_folder) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` from the top, sorted, without hidden names (`._a.jpg` of macOS); removing folder names prunes it.

    Links are followed, except into a folder that contains them. `refuse` is called for each unreadable folder. Raises
    `UserError` for links that lead to one folder over and over.
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
    r"""The name with bytes that are not UTF-8 written as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def named(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    return first_names(list(names), MAX_NAMED)
