"""Files of a user's own folders: their kinds, and pairs of image and mask."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from kmine.data.io.dicom_seg import pair_segs
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
    more: tuple[Path, ...] = ()
    """Further masks, united with the first."""

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


def pair_folders(
    images: Path, masks: Path | None, on_error: OnError, mask_suffix: str = ""
) -> tuple[list[Item], tuple[Skipped, ...]]:
    """Images sorted by name, with masks of the same relative path without suffix, if any, and files left out.

    Args:
        images: folder of images, searched with all its subfolders.
        masks: folder of masks, likewise, if any; may lie inside the other.
        on_error: whether a mask without an image stops, or is listed.
        mask_suffix: end of the names of masks, which may then be in the folder of the images.

    Raises:
        UserError: for a folder that is missing, unreadable or without images, for two files of one name, for masks
            without any pair, and for a mask of another kind than its image.
    """
    image_paths, strays = _index(images, "data.images", on_error, excluded=masks)
    is_one_folder = masks is not None and is_folder(masks) and masks.resolve() == images.resolve()
    if is_one_folder and not mask_suffix:
        raise UserError(
            f"data.masks: expected another folder than that of the images, got {masks} for both; if the masks' names "
            "end differently, pass --data.mask_suffix, as in --data.mask_suffix _mask"
        )
    if not image_paths:
        raise _no_files("data.images", images, strays, "name another folder")
    mask_paths: dict[str, Path] = {}
    mask_strays: list[Skipped] = []
    if masks is not None and not is_one_folder:
        mask_paths, mask_strays = _index(masks, "data.masks", on_error, excluded=images)
    more: dict[str, list[Path]] = defaultdict(list)
    if mask_suffix:
        among = image_paths if masks is None or is_one_folder else mask_paths
        mask_paths, more, others = _without_suffix(among, image_paths, split_suffix(mask_suffix)[0])
        if among is not image_paths:
            mask_strays += others
    if mask_strays and not mask_paths:
        raise _no_files("data.masks", masks or images, mask_strays, "convert the masks")
    dicoms = {name: path for name, path in image_paths.items() if file_kind(path) == "dicom"}
    segs = {name: path for name, path in mask_paths.items() if file_kind(path) == "dicom"}
    if segs:
        mask_paths = {name: path for name, path in mask_paths.items() if name not in segs} | pair_segs(dicoms, segs)
    if mask_paths and not image_paths.keys() & mask_paths.keys():
        suffix = _common_suffix(image_paths, mask_paths)
        raise UserError(
            f"data.masks: expected masks named like their images (suffixes apart), found no pair: images such as "
            f"{_first(image_paths, images)}, masks such as {_first(mask_paths, masks or images)}; "
            + (f"pass --data.mask_suffix {suffix}, " if suffix else "rename the masks, ")
            + "or pair the files with --data.csv FILE"
        )
    orphans = drop_orphans(mask_paths, image_paths, "data.masks", on_error)
    items = [
        Item(name, path, mask_paths.get(name), more=tuple(more.get(name, ())))
        for name, path in sorted(image_paths.items())
    ]
    for item in items:
        for mask in (item.mask, *item.more):
            if problem := mismatch(item.image, mask):
                raise UserError(f"{mask}: {problem}")
    return items, (*strays, *mask_strays, *orphans)


def _without_suffix(
    among: dict[str, Path], images: dict[str, Path], suffix: str
) -> tuple[dict[str, Path], dict[str, list[Path]], list[Skipped]]:
    """Masks by the name of their image, further masks (`NAME_mask_1`), and other files; masks are no images any more.

    Raises:
        UserError: for no mask, and for a further mask without a first.
    """
    pattern = re.compile(rf"(.+){re.escape(suffix)}([_-]?\d+)?", re.DOTALL)
    matches = {name: match for name in sorted(among) if (match := pattern.fullmatch(name))}
    # A number may belong to the name of an image.
    matches = {name: match for name, match in matches.items() if not match[2] or match[1] in images}
    first = {match[1]: among[name] for name, match in matches.items() if not match[2]}
    if not first:
        raise UserError(
            f"data.mask_suffix: expected masks with names that end in {suffix!r}, found none; files are such as "
            f"{among[min(among)] if among else 'none'}"
        )
    more: dict[str, list[Path]] = defaultdict(list)
    for name, match in matches.items():
        if match[2] and match[1] not in first:
            raise UserError(f"{among[name]}: expected a first mask {match[1]}{suffix} beside it, found none; rename it")
        if match[2]:
            more[match[1]].append(among[name])
    others = [
        Skipped(name, str(path), f"not named NAME{suffix}") for name, path in among.items() if name not in matches
    ]
    if among is images:
        for name in matches:
            del images[name]
    return first, more, others


def _common_suffix(images: dict[str, Path], masks: dict[str, Path]) -> str | None:
    """What follows the name of an image in the names of most masks; None if nothing does."""
    own = max((name for name in images if min(masks).startswith(name)), key=len, default=None)
    suffix = min(masks)[len(own) :] if own is not None else ""
    paired = sum(name.endswith(suffix) and name.removesuffix(suffix) in images for name in masks)
    return suffix if suffix and "/" not in suffix and paired > len(masks) / 2 else None


def _no_files(setting: str, folder: Path, strays: Sequence[Skipped], cure: str) -> UserError:
    """The error for a folder without images or masks, which names what it holds instead."""
    others = "none"
    if strays:
        content = describe_content(Path(strays[0].path)) or "of unknown content"
        others = f"{len(strays)} others, such as {strays[0].path} ({content})"
    kinds = KINDS if setting == "data.images" else "PNG, TIFF, BMP, GIF, JPEG or NIfTI"
    return UserError(f"{setting}: expected {kinds} files in {folder}, found {others}; {cure}")


def mismatch(image: Path, mask: Path | None) -> str | None:
    """Problem with the file kind of a mask; None where it fits the image."""
    if mask is None:
        return None
    expected: Kind = "nifti" if file_kind(image) == "nifti" else "picture"
    words = {"nifti": "a NIfTI file (.nii, .nii.gz)", "picture": "a picture (PNG, TIFF, BMP, GIF or JPEG)"}
    if file_kind(mask) == expected or file_kind(mask) == file_kind(image) == "dicom":
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
