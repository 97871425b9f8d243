"""Interface of a data set, and checks of files that all data sets share."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kmine.errors import SampleError, UserError
from kmine.types import SLICE_ID, SampleRef, Skipped

BLOCK_BYTES = 2**20
"""Bytes read at once."""
MAX_TABLE = 2**26
"""Bytes of a CSV file. Tables are read line by line, but a file without line ends is a single line."""
INDEX, NUMBER = re.compile(r"(unnamed: [\d.]+)?", re.IGNORECASE), re.compile(r"(\d+(\.0)?)?")
"""Name of a column of row numbers as pandas writes and reads it, and its values."""


class Symmetry(NamedTuple):
    """Changes of geometry after which an image of a data set could still be one of it."""

    flips: Literal["auto", "none", "horizontal", "both"] = "horizontal"
    rotation: float = 30.0
    """Largest angle in degrees."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest magnification."""


ENDOSCOPY = Symmetry("horizontal", 180.0, (0.6, 1.6))
"""The endoscope turns about its own axis, so there is no up or left; the distance to the wall varies much. A vertical
flip is a mirror image that is turned by 180 degrees: beside full rotation it gains nothing (experiments/recipe)."""
AXIAL_CT = Symmetry("horizontal", 15.0)
"""Spine and table are below, so no vertical flip. Which side is left depends on headers that are often wrong."""
CHEST_XRAY = Symmetry("none", 10.0)
"""The heart is on the left: mirrored, its shadow is an opacity where none is expected."""
OnError = Literal["stop", "skip"]
SKIP_HINT = "pass --data.on_error skip to list and leave out such files"
is_file, is_folder = os.path.isfile, os.path.isdir
"""False also for names that no file system accepts, for which the methods of `Path` may raise."""


class SliceLocation(NamedTuple):
    """Position of a sample in the NIfTI volume it was cut from."""

    volume: str
    """Name of the volume."""
    path: Path
    number: int
    """Number of the axial slice, 0 is the lowest."""


class Source(Protocol):
    """A data set: an index built without reading a pixel, and readers for one sample at a time.

    Files are not required: a source may return arrays in memory, which are cached on disk like decoded images. Readers
    are called from several threads and, after pickling, from other processes.
    """

    @property
    def name(self) -> str:
        """Name in the config (`data.name`); also begins the name of its cache folder."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id; 0 is "background"."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that the index left out, and why."""

    def refs(self) -> tuple[SampleRef, ...]:
        """All samples, sorted by `sample_id`."""

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]. Raises `SampleError` for a damaged or unsuitable file."""

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids, size of the image. Raises `SampleError` for a damaged, unsuitable or missing file."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of settings and names, sizes and times of files; without files, of images and masks."""

    def slice_location(self, sample_id: str) -> SliceLocation | None:
        """Volume and slice of a sample; None for an image that is no slice of a NIfTI volume and for an unknown id."""


class IndexedSource:
    """What the built-in data sets share."""

    _fingerprint: str
    _stacks: Mapping[str, tuple[Path, int]] = {}
    """File and number of slices of each NIfTI volume, by name."""
    notes: tuple[str, ...] = ()
    """What `kmine check` says of the files as a whole, a sentence each."""
    symmetry: Symmetry = Symmetry()
    """Changes of geometry that training may apply; read from any source that has it (`setup.resolve`)."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings and, at indexing, of names, sizes and modification times."""
        return self._fingerprint

    def slice_location(self, sample_id: str) -> SliceLocation | None:
        """Volume and slice of a sample; None for other images and for an unknown id."""
        match = SLICE_ID.fullmatch(sample_id)
        stack = self._stacks.get(match[1]) if match else None
        if match is None or stack is None or int(match[2]) >= stack[1]:
            return None
        return SliceLocation(match[1], stack[0], int(match[2]))


def choose_task(requested: str, name: str, tasks: Sequence[str]) -> str:
    """Task of the data set `name` for `data.task`; "auto" selects the first. Raises `UserError` for any other."""
    if requested != "auto" and requested not in tasks:
        raise UserError(f"data.task: expected auto or one of {', '.join(tasks)} for {name}, got {requested!r}")
    return tasks[0] if requested == "auto" else requested


def fingerprint_files(settings: Mapping[str, object], root: Path, files: Iterable[Path]) -> str:
    """SHA-256 (hex) over settings and, relative to `root`, the names, sizes and modification times of files."""
    rows = sorted((file.relative_to(root).as_posix(), *size_and_time(file)) for file in files)
    return hashlib.sha256(json.dumps([dict(settings), rows], sort_keys=True).encode()).hexdigest()


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and modification time in ns; (-1, -1) for a broken link or the like, which the reader reports."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def require_file(path: Path, expected: str) -> int:
    """Size in bytes; refuses a path that is no file with content, as opening a pipe may block for ever.

    `expected` names the content in the message, as in "an image".

    Raises:
        SampleError: for a missing or empty file, a broken or circular link, a folder, a pipe, socket or device.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        actual = "a link to nothing" if path.is_symlink() else "no such file"
        raise SampleError(str(path), f"expected {expected}, found {actual}; check the path, or data.root") from error
    except OSError as error:
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions and links") from error
    if not stat.S_ISREG(status.st_mode):
        actual = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise SampleError(str(path), f"expected {expected}, got {actual}; move it away, or put the file in its place")
    if status.st_size == 0:
        raise SampleError(str(path), f"expected {expected}, got an empty file (0 bytes); copy or download it again")
    return status.st_size


def table_text(path: Path, setting: str, expected: str = "a CSV file") -> str:
    """Text of a table or list of the user's, UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        setting: setting that names it, for messages.
        expected: what it should be, for messages.

    Raises:
        UserError: for a missing or empty file, one of more than `MAX_TABLE` bytes, a pipe, and other bytes.
    """
    try:
        size = require_file(path, expected)
    except SampleError as error:
        raise UserError(f"{setting}: {error}") from error
    if size > MAX_TABLE:
        raise UserError(f"{setting}: {path}: expected a table of at most {MAX_TABLE:,} bytes, got {size:,}; split it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read ({error.strerror}); give {expected}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {expected} in UTF-8, got something else ({error}); save it anew") from error
    if "\0" in text:
        raise UserError(f"{path}: expected {expected} in UTF-8, got something else (NUL); save it anew")
    return text


def csv_rows(path: Path, setting: str, *, exact: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line number and values, stripped unless `exact`, of each non-empty row of a CSV file, header included.

    Separated by commas, or by the semicolons or tabs of a header without commas. Columns of row numbers, which pandas
    writes without a name, are left out. `setting` names the file in messages.

    Raises:
        UserError: for the faults of `table_text`, a file that is no CSV, and other values in a column without a name.
    """
    text = table_text(path, setting)
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = next((sign for sign in ",;\t" if sign in header), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    numbers: list[int] | None = None
    try:
        for values in reader:
            row = [value.strip() for value in values]
            if not any(row):
                continue
            if numbers is None:
                numbers = [at for at, name in enumerate(row) if INDEX.fullmatch(name)]
            elif odd := [row[at] for at in numbers if at < len(row) and not NUMBER.fullmatch(row[at])]:
                raise UserError(
                    f"{path}, line {reader.line_num}: expected a row number in the column without a name, got "
                    f"{odd[0]!r}; name that column in the header, or remove it"
                )
            kept = values if exact else row
            yield reader.line_num, [value for at, value in enumerate(kept) if at not in numbers]
    except csv.Error as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8, got something else ({error}); save it anew") from error


def stop_or_skip(sample_id: str, error: SampleError, on_error: OnError) -> Skipped:
    """Entry for `skipped`; with "stop" raise the error again, with the way to skip it."""
    if on_error == "stop":
        raise SampleError(error.path, f"{error.problem}; or {SKIP_HINT}") from error
    return Skipped(sample_id, error.path, error.problem)


def require_root(root: Path, name: str, where: str) -> None:
    """Refuse a root of the data set `name`, published at `where`, that is no folder. Raises `UserError`."""
    if not is_folder(root):
        nothing = f"nothing; pass --data.root ({where})"
        actual = "a file; unpack it and pass the folder" if os.path.lexists(root) else nothing
        raise UserError(f"{root}: expected the {name} folder, found {actual}")
