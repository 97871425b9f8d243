"""Find the images to predict: files, folders, volumes, DICOM series; and name their outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kmine.data.datasets.folder_index import KINDS, Kind, file_kind, split_suffix
from kmine.data.io.dicom import read_header
from kmine.data.io.dicom_series import group_series
from kmine.data.io.file_content import describe_content
from kmine.data.io.find_files import UNWRITABLE, printable, walk
from kmine.data.source import is_folder
from kmine.errors import SampleError, UserError
from kmine.io.errors import expanded
from kmine.types import Skipped

InputKind = Literal["picture", "dicom", "nifti", "series", "frames"]
"""`frames` is a DICOM file of several."""


@dataclass(frozen=True)
class Input:
    """One image or volume to predict."""

    name: str
    """Name of its outputs: the path below the folder given by the user, without suffix."""
    kind: InputKind
    files: tuple[Path, ...]
    """One file, those of a series, or of channels."""
    warning: str = ""

    @property
    def is_volume(self) -> bool:
        """Whether its mask is a volume."""
        return self.kind in ("nifti", "series", "frames")

    @property
    def is_dicom(self) -> bool:
        """Whether a DICOM segmentation can refer to it."""
        return self.kind in ("dicom", "series", "frames")

    @property
    def path(self) -> Path:
        """The file, or the folder of the series."""
        return self.files[0].parent if self.kind == "series" else self.files[0]


@dataclass(frozen=True)
class Inputs:
    """Result of the search."""

    readable: tuple[Input, ...]
    unreadable: tuple[Skipped, ...]
    """Files with names that are not UTF-8, which no table can hold."""
    num_others: int
    """Skipped files of other kinds."""


def find_inputs(words: Sequence[str], closed: Path) -> Inputs:
    """Find inputs among files and, recursively, folders; `closed`, the folder of outputs, is skipped.

    Raises:
        UserError: a missing path, a file of no known kind, or two inputs whose masks would have the same name.
    """
    inputs: list[Input] = []
    unreadable: list[Skipped] = []
    num_others = 0
    for word in words:
        path = expanded(word)
        if not os.path.lexists(path):
            raise UserError(f"{word}: expected an image or a folder, found nothing there; check the path")
        is_file = not is_folder(path)
        if is_file and file_kind(path) is None:
            content = describe_content(path) or "something else"
            raise UserError(f"{word}: expected {KINDS}, or a folder of these, got {content}; convert the file")
        root = path.parent if is_file else path
        for folder, files in [(root, [path])] if is_file else _walk_outside(root, closed):
            kinds = {file: kind for file in files if (kind := file_kind(file)) is not None}
            num_others += len(files) - len(kinds)
            unwritable = [file for file in kinds if printable(file) != str(file)]
            unreadable += [Skipped(printable(file.stem), printable(file), UNWRITABLE) for file in unwritable]
            inputs += _inputs(root, folder, {file: kind for file, kind in kinds.items() if file not in unwritable})
    _refuse_collisions(inputs)
    return Inputs(tuple(sorted(inputs, key=lambda item: (item.is_volume, item.name))), tuple(unreadable), num_others)


def inputs_of_channels(inputs: Inputs, channels: Mapping[int, str]) -> Inputs:
    """Files NAME_0000, NAME_0001, ..., as nnU-Net names channels, as one input NAME each.

    `channels` has the names of those to use by number, in the order of the colours.

    Raises:
        UserError: a file of another name or kind, or an image that lacks a channel.
    """
    cases: dict[str, dict[int, Input]] = {}
    for item in inputs.readable:
        name, _, number = item.name.rpartition("_")
        if item.kind not in ("picture", "nifti") or not re.fullmatch(r"\d{4}", number):
            problem = f"expected pictures or NIfTI files, one for each of {', '.join(channels.values())}, as NAME_0000"
            raise UserError(f"{item.path}: {problem}, got another; rename it, or name other files")
        cases.setdefault(name, {})[int(number)] = item
    merged = []
    for name, items in cases.items():
        if lacking := [number for number in channels if number not in items]:
            problem = f"expected a file {lacking[0]:04} (channel {channels[lacking[0]]}) of {name}, found none"
            raise UserError(f"{next(iter(items.values())).path.parent}: {problem}; restore it, or leave out {name}")
        own = [items[number] for number in channels]
        merged.append(replace(own[0], name=name, files=tuple(item.path for item in own)))
    return replace(inputs, readable=tuple(merged))


def _inputs(root: Path, folder: Path, kinds: dict[Path, Kind]) -> Iterator[Input]:
    series, single_files = group_series(sorted(file for file, kind in kinds.items() if kind == "dicom"))
    warning = "an image beside a series, such as its localizer: predicted as a picture" if series else ""
    for file in single_files:
        name = _name(root, file)
        yield Input(name, "frames", (file,)) if _has_frames(file) else Input(name, "dicom", (file,), warning)
    yield from (Input(_name(root, file), kind, (file,)) for file, kind in kinds.items() if kind != "dicom")
    inside = folder.relative_to(root).as_posix()
    name = folder.resolve().name if inside == "." else inside
    for number, files in enumerate(series, 1):
        # Not named after series descriptions: these may contain the patient's name.
        yield Input(name if len(series) == 1 else f"{name}/series-{number}", "series", files)


def _has_frames(file: Path) -> bool:
    try:
        return read_header(file).frames > 1
    except SampleError:  # reported when read
        return False


def _name(root: Path, file: Path) -> str:
    return split_suffix(file.relative_to(root).as_posix())[0]


def _walk_outside(root: Path, closed: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders from `root` down, without `closed`, each with its files."""
    excluded = closed.resolve()
    for folder, folders, names in walk(root):
        folders[:] = [name for name in folders if (folder / name).resolve() != excluded]
        if folder.resolve() != excluded:
            yield folder, [folder / name for name in sorted(names)]


def _refuse_collisions(inputs: Sequence[Input]) -> None:
    # Some file systems ignore case.
    by_name: dict[str, Input] = {}
    for item in inputs:
        other = by_name.setdefault(item.name.casefold(), item)
        if other is not item:
            raise UserError(
                f"expected one image per name, found {other.path} and {item.path}, whose masks would both be named "
                f"{item.name}; rename one, or predict them into two folders"
            )
