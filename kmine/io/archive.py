"""Zip archives that somebody else made: unpacked whole or not at all, and nowhere but below one folder.

What an archive says of itself is a claim. Names and kinds of all members are looked at before the first byte is
written, sizes while they are written, and only what was unpacked without a fault is moved to where it belongs.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kmine.errors import UserError
from kmine.io.download import check_space
from kmine.io.errors import storage_errors

CHUNK_BYTES = 1 << 20
UNFINISHED = ".kmine-unpacking-"
"""How the name of a folder begins in which an archive is being unpacked."""
JUNK = "__MACOSX/"
"""macOS adds this folder beside the data; it is left out."""
RATIO_FROM_BYTES = 1 << 20
"""The ratio is not checked below this: a small file may be all zeros."""
MAX_DEPTH = 32
"""Folders within folders."""
MAX_TAIL = 22 + (1 << 16)
"""Bytes of the record that ends a zip file, its comment included."""
CURE = "nothing was unpacked; download the archive again from where it is published"

Contents = dict[str, tuple[int, int]]
"""Files by their path below the target, with "/": size in bytes and CRC-32."""

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)
"""What zipfile raises for damaged bytes; which of them depends on the byte."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to.

    COVID-QU-Ex has 85,000 files; LiTS, 58,638 slices of 512 x 512, takes 61 GB at two bytes a pixel of image and mask.
    """

    members: int = 300_000
    """Files and folders."""
    total_bytes: int = 200 * 2**30
    """Of all files together."""
    ratio: int = 100
    """Unpacked bytes for each byte of the archive."""


DEFAULT = Limits()


def read_contents(archive: Path, limits: Limits = DEFAULT) -> Contents:
    """The files of a zip archive, by its own directory; none is unpacked.

    Raises:
        UserError: for whatever `unpack` refuses before it writes.
    """
    with _opened(archive) as opened:
        return _contents(_checked(archive, opened.infolist(), limits))


def unpack(
    archive: Path, target: Path, limits: Limits = DEFAULT, advance: Callable[[int], None] = lambda done: None
) -> Contents:
    """Unpack a zip archive into a folder, all of it or nothing; what is there already is never touched.

    Args:
        archive: regular files and folders, stored or deflated, not encrypted.
        target: made if it is missing.
        limits: beyond which the archive is refused, as it says of itself or as it turns out.
        advance: told after each file how many are done.

    Returns:
        The files that are now there.

    Raises:
        UserError: for an archive that is no zip, damaged or truncated, encrypted, hostile (see `_checked`), or too
            large; for a member that is in `target` already; for a full disk. Nothing is left behind then.
    """
    with _opened(archive) as opened:
        members = _checked(archive, opened.infolist(), limits)
        contents = _contents(members)
        refuse_clash(contents, target)
        with storage_errors(target), _workshop(target) as folder:
            check_space(target, sum(size for size, _ in contents.values()), f"unpacking {archive.name}")
            _write(archive, opened, members, folder, limits, advance)
            _publish(folder, target)
    return contents


def top_names(contents: Iterable[str]) -> list[str]:
    """The first parts of paths, each once, sorted."""
    return sorted({name.split("/")[0] for name in contents})


def refuse_clash(contents: Iterable[str], target: Path) -> None:
    """Raises `UserError` where something in `target` already has the name of a file or folder to come."""
    present = [name for name in top_names(contents) if os.path.lexists(target / name)]
    if present:
        raise UserError(
            f"{target / present[0]}: expected nothing there yet, found files that would be overwritten; they were left "
            "alone: move them away, or choose another folder"
        )


def differences(contents: Mapping[str, tuple[int, int]], folder: Path) -> list[str]:
    """Which of the files are missing below `folder`, or not what they were; every byte is read."""
    return [name for name, (size, crc) in contents.items() if not _is_same(folder / name, size, crc)]


def drop_leftovers(target: Path) -> None:
    """Remove what a killed process left half unpacked; only while no other process unpacks into `target`."""
    for folder in target.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_same(path: Path, size: int, crc: int) -> bool:
    try:
        if not path.is_file() or path.stat().st_size != size:
            return False
        crc_read = 0
        with path.open("rb") as stream:
            while block := stream.read(CHUNK_BYTES):
                crc_read = zlib.crc32(block, crc_read)
    except OSError:
        return False
    return crc_read == crc


def _contents(members: Iterable[zipfile.ZipInfo]) -> Contents:
    return {info.filename: (info.file_size, info.CRC) for info in members if not info.is_dir()}


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    if not archive.is_file():
        actual = "a folder" if archive.is_dir() else "nothing"
        raise UserError(f"{archive}: expected a zip archive, found {actual}; name the file as it was downloaded")
    with storage_errors(archive), archive.open("rb") as stream:
        begins_well = stream.read(4) == b"PK\x03\x04"
        try:
            opened = zipfile.ZipFile(stream)
        except (*_DAMAGE, OSError) as error:  # OSError: it seeks to where a damaged directory points
            actual = "one that is truncated or damaged" if begins_well else "another kind of file, or a damaged one"
            raise UserError(
                f"{archive}: expected a zip archive, got {actual} ({_first_line(error)}); {CURE}"
            ) from error
        if not _is_complete(stream, len(opened.infolist())):
            raise UserError(f"{archive}: its directory is damaged (members are missing in it); {CURE}")
        with opened:
            yield opened


def _is_complete(stream: BinaryIO, num_members: int) -> bool:
    """Whether the directory of a zip file counts as many members as were found in it, which zipfile does not ask."""
    stream.seek(max(stream.seek(0, os.SEEK_END) - MAX_TAIL, 0))
    tail = stream.read()
    (count,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\x05\x06") + 10)
    return count in (num_members % (1 << 16), 0xFFFF)  # 0xFFFF: it is counted elsewhere, in the zip64 format


def _checked(archive: Path, members: Sequence[zipfile.ZipInfo], limits: Limits) -> list[zipfile.ZipInfo]:
    """The members worth unpacking, if there is nothing wrong with any by what the directory says of them."""
    if len(members) > limits.members:
        raise _refusal(archive, f"{len(members):,} members, at most {limits.members:,} are unpacked")
    chosen = [info for info in members if not info.orig_filename.startswith(JUNK)]
    for info in chosen:
        fault = _name_fault(info.orig_filename) or _kind_fault(info)
        if fault:
            raise _refusal(archive, f"{info.orig_filename!r}: {fault}")
    clash = _find_clash(info.filename for info in chosen)
    if clash:
        raise _refusal(archive, clash)
    if all(info.is_dir() for info in chosen):
        raise UserError(f"{archive}: expected files, found none in it; name another archive")
    _check_total(archive, sum(info.file_size for info in chosen), limits)
    return chosen


def _name_fault(name: str) -> str | None:
    """What is wrong with the name of a member, if anything."""
    parts = name.removesuffix("/").split("/")
    if "\\" in name:
        return "a backslash, which some systems take for a folder"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "an absolute path"
    if ".." in parts:
        return "a path that leads out of the folder"
    if "" in parts or "." in parts:
        return "a path with an empty part"
    if any(unicodedata.category(sign) == "Cc" for sign in name):
        return "a name with control characters"
    return f"more than {MAX_DEPTH} folders deep" if len(parts) > MAX_DEPTH else None


def _kind_fault(info: zipfile.ZipInfo) -> str | None:
    """Why a member is not unpacked, whatever its name, if so."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device or another special file"
    if (kind == stat.S_IFDIR and not info.is_dir()) or (info.is_dir() and (kind == stat.S_IFREG or info.file_size)):
        return "a file and a folder in one"
    if info.flag_bits & 0x2041:  # bits 0, 6 and 13: encrypted, strongly encrypted, encrypted directory
        return "encrypted; unpack the archive yourself"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by method {info.compress_type}, which is not read here; unpack the archive yourself"
    return None


def _find_clash(names: Iterable[str]) -> str | None:
    """Two members that would be one file on some system, if there are any: by case, by spelling, or file and folder."""
    seen: dict[str, tuple[str, bool]] = {}
    for name in names:
        parts = name.removesuffix("/").split("/")
        for depth in range(1, len(parts) + 1):
            path, is_file = "/".join(parts[:depth]), depth == len(parts) and not name.endswith("/")
            key = unicodedata.normalize("NFC", path).casefold()
            if key not in seen:
                seen[key] = path, is_file
                continue
            first, was_file = seen[key]
            if first != path:
                return f"{first!r} and {path!r}, which differ only in the case or the spelling of letters"
            if is_file != was_file:
                return f"{path!r}: a file and a folder in one"
            if is_file:
                return f"{path!r} twice"
    return None


def _check_total(archive: Path, total: int, limits: Limits) -> None:
    """Refuse more unpacked bytes than an archive of its size may have."""
    if total > limits.total_bytes:
        raise _refusal(archive, f"it unpacks to more than {limits.total_bytes:,} bytes")
    if total > max(limits.ratio * archive.stat().st_size, RATIO_FROM_BYTES):
        raise _refusal(archive, f"it unpacks to more than {limits.ratio} times its size")


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder in `target`, so on its file system, that is gone afterwards; so is `target` if made here for nothing."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # where all went well it is not empty
                target.rmdir()


def _write(
    archive: Path,
    opened: zipfile.ZipFile,
    members: Iterable[zipfile.ZipInfo],
    folder: Path,
    limits: Limits,
    advance: Callable[[int], None],
) -> None:
    total = done = 0
    for info in members:
        path = folder / info.filename
        if info.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        before = total
        with path.open("xb") as sink:
            for block in _blocks(archive, opened, info):
                total += len(block)
                _check_total(archive, total, limits)
                sink.write(block)
        if total - before != info.file_size:
            raise _damaged(archive, info, f"{total - before:,} bytes instead of {info.file_size:,}")
        done += 1
        advance(done)


def _blocks(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member; zipfile compares its CRC at the end."""
    try:
        with opened.open(info) as source:
            while block := source.read(CHUNK_BYTES):
                yield block
    except _DAMAGE as error:
        raise _damaged(archive, info, _first_line(error)) from error


def _publish(folder: Path, target: Path) -> None:
    """Move all that is in `folder` to `target`, or, where that fails, back again."""
    names = sorted(child.name for child in folder.iterdir())
    refuse_clash(names, target)
    try:
        for name in names:
            (folder / name).rename(target / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(folder / name):
                (target / name).rename(folder / name)
        raise


def _refusal(archive: Path, fault: str) -> UserError:
    return UserError(f"{archive}: expected an archive of plain files and folders, found {fault}; {CURE}")


def _damaged(archive: Path, info: zipfile.ZipInfo, problem: str) -> UserError:
    return UserError(f"{archive}: {info.filename!r} is damaged ({problem}); {CURE}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
