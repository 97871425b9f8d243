"""Files of a user's own folders: their kinds, and pairs of image and mask."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from kmine.data.io.file_content import describe_content
from kmine.data.io.find_files import UNWRITABLE, drop_orphans, printable, walk
from kmine.data.source import OnError, is_folder
from kmine.errors import SampleError, UserError
from kmine.types import Skipped

Kind = Literal["picture", "nifti", "dicom"]
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif"), "picture"),
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
    ".dcm": "dicom",
}
KINDS = "PNG, JPEG, TIFF, BMP, GIF, DICOM (.dcm, or no suffix) or NIfTI (.nii, .nii.gz)"
DIRECTORY = "DICOMDIR"
"""Name of DICOM's table of contents, which is no image."""


@dataclass(frozen=True)
class Item:
    """One image file with its mask, group, label and split; for a NIfTI volume they apply to all slices."""

    name: str
    """Path relative to the folder (or to the folder of the table), without suffix."""
    image: Path
    mask: Path | None
    group: str | None = None
    label: int | None = None
    split: str | None = None

    @cached_property
    def kind(self) -> Kind:
        """Kind of the image file."""
        kind = file_kind(self.image)
        assert kind is not None, "other files are not indexed"
        return kind


def split_suffix(name: str) -> tuple[str, Kind | None]:
    """`a/scan.1.nii.gz` -> `a/scan.1`, nifti; the kind is None for an unknown suffix.

    The name is normalized (NFC), as macOS stores an umlaut as two characters.
    """
    name = unicodedata.normalize("NFC", name)
    for suffix, kind in SUFFIXES.items():
        if name.lower().endswith(suffix):
            return name[: -len(suffix)], kind
    return name, None


def file_kind(path: Path) -> Kind | None:
    """Kind by suffix, else DICOM by the first bytes (PS3.10, 7.1), as DICOM files often have no suffix."""
    kind = split_suffix(path.name)[1]
    if kind is not None or path.name.upper() == DIRECTORY:
        return kind
    return "dicom" if (describe_content(path) or "").startswith("a DICOM") else None


def pair_folders(images: Path, masks: Path | None, on_error: OnError) -> tuple[list[Item], tuple[Skipped, ...]]:
    """Images sorted by name, with masks of the same relative path without suffix, if any, and files left out.

    Args:
        images: folder of images, searched with all its subfolders.
        masks: folder of masks, likewise, if any; may lie inside the other.
        on_error: whether a mask without an image stops, or is listed.

    Raises:
        UserError: for a folder that is missing, unreadable or without images, for two files of one name, for masks
            without any pair, and for a mask of another kind than its image.
    """
    image_paths, strays = _index(images, "data.images", on_error, excluded=masks)
    if masks is not None and is_folder(masks) and masks.resolve() == images.resolve():
        raise UserError(f"data.masks: expected another folder than that of the images, got {masks} for both")
    if not image_paths:
        raise _no_files("data.images", images, strays, "name another folder")
    mask_paths, mask_strays = _index(masks, "data.masks", on_error, excluded=images) if masks is not None else ({}, [])
    if mask_strays and not mask_paths:
        raise _no_files("data.masks", masks or images, mask_strays, "convert the masks")
    if mask_paths and not image_paths.keys() & mask_paths.keys():
        raise UserError(
            f"data.masks: expected masks named like their images (suffixes apart), found no pair: images such as "
            f"{_first(image_paths, images)}, masks such as {_first(mask_paths, masks or images)}; "
            "rename the masks, or pair the files with --data.csv FILE"
        )
    orphans = drop_orphans(mask_paths, image_paths, "data.masks", on_error)
    items = [Item(name, path, mask_paths.get(name)) for name, path in sorted(image_paths.items())]
    for item in items:
        if problem := mismatch(item.image, item.mask):
            raise UserError(f"{item.mask}: {problem}")
    return items, (*strays, *mask_strays, *orphans)


def _no_files(setting: str, folder: Path, strays: Sequence[Skipped], cure: str) -> UserError:
    """The error for a folder without images or masks, which names what it holds instead."""
    others = "none"
    if strays:
        content = describe_content(Path(strays[0].path)) or "of unknown content"
        others = f"{len(strays)} others, such as {strays[0].path} ({content})"
    return UserError(f"{setting}: expected {KINDS} files in {folder}, found {others}; {cure}")


def mismatch(image: Path, mask: Path | None) -> str | None:
    """Problem with the file kind of a mask; None where it fits the image."""
    if mask is None:
        return None
    expected: Kind = "nifti" if file_kind(image) == "nifti" else "picture"
    words = {"nifti": "a NIfTI file (.nii, .nii.gz)", "picture": "a picture (PNG, TIFF, BMP, GIF or JPEG)"}
    if file_kind(mask) == expected:
        return None
    return f"expected {words[expected]} as mask of {image.name}, got {mask.name}; convert the mask"


def _index(
    folder: Path, setting: str, on_error: OnError, excluded: Path | None
) -> tuple[dict[str, Path], list[Skipped]]:
    """Files by name, and those of unknown kind; the folder `excluded` is not entered."""
    if not is_folder(folder):
        actual = "a file" if os.path.lexists(folder) else "nothing"
        raise UserError(f"{setting}: expected a folder, found {actual} at {folder}; check the path")
    paths: dict[str, Path] = {}
    strays = []
    for path in sorted(_files(folder, setting, excluded)):
        name = split_suffix(path.relative_to(folder).as_posix())[0]
        if file_kind(path) is None:
            strays.append(Skipped(printable(name), printable(path), f"not a {KINDS} file"))
        elif printable(name) != name:
            if on_error == "stop":
                raise SampleError(printable(path), UNWRITABLE)
            strays.append(Skipped(printable(name), printable(path), UNWRITABLE))
        elif name in paths:
            raise UserError(
                f"{folder}: expected one file a name, found {paths[name].relative_to(folder)} and "
                f"{path.relative_to(folder)}; remove one of them"
            )
        else:
            paths[name] = path
    return paths, strays


def _files(root: Path, setting: str, excluded: Path | None) -> Iterable[Path]:
    """All files below a folder, and empty folders with the suffix of an image, left by a failed extraction."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read ({error.strerror}); check it") from error

    closed = excluded.resolve() if excluded is not None and is_folder(excluded) else None
    for folder, folders, names in walk(root, refuse):
        if not folders and not names and folder != root and split_suffix(folder.name)[1] is not None:
            yield folder
        folders[:] = [name for name in folders if (folder / name).resolve() != closed]
        yield from (folder / name for name in names)


def _first(paths: dict[str, Path], folder: Path) -> str:
    return paths[min(paths)].relative_to(folder).as_posix()
