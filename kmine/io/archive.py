"""Zip archives from untrusted sources: unpacked whole or not at all, and only below one folder.

Names and kinds of all members are checked before the first byte is written, sizes during writing.
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
from zipfile import ZipFile, ZipInfo

from kmine.errors import UserError
from kmine.io.download import check_space
from kmine.io.errors import storage_errors, user_errors

CHUNK_BYTES = 1 << 20
UNFINISHED = ".kmine-unpacking-"
"""Prefix of the temporary folder into which an archive is unpacked."""
JUNK = "__MACOSX/"
"""Folder that macOS adds beside the data; not unpacked."""
RATIO_FROM_BYTES = 1 << 20
"""The ratio is not checked below this: a small file may be all zeros."""
MAX_DEPTH, MAX_NAME, MAX_PATH = 32, 255, 1024
"""Limits of a member's path: parts, bytes of each, letters of all; file systems allow little more."""
MAX_TAIL = 22 + (1 << 16)
"""Largest size in bytes of the record at the end of a zip file, comment included."""
CURE = "nothing was unpacked; download the archive again from where it is published"

Contents = dict[str, tuple[int, int]]
"""Files by their path below the target, with "/": size in bytes and CRC-32."""
Advance = Callable[[int], None]

_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError, OverflowError)
"""Errors of zipfile for damaged bytes."""


@dataclass(frozen=True)
class Limits:
    """Limits of an archive's content.

    COVID-QU-Ex has 85,000 files; LiTS, 58,638 slices of 512 x 512, takes 61 GB at two bytes per pixel.
    """

    members: int = 300_000
    """Number of files and folders."""
    total_bytes: int = 200 * 2**30
    ratio: int = 100
    """Unpacked bytes per byte of the archive."""


DEFAULT = Limits()


def read_contents(archive: Path, limits: Limits = DEFAULT) -> Contents:
    """Files listed in the directory of a zip archive. Raises `UserError` for what `unpack` refuses before it writes."""
    with _opened(archive) as opened:
        return _contents(_checked(archive, opened.infolist(), limits))


def unpack(archive: Path, target: Path, limits: Limits = DEFAULT, advance: Advance = lambda done: None) -> Contents:
    """Unpack a zip archive into a folder, completely or not at all; existing files are not touched.

    Members are regular files and folders, stored or deflated, not encrypted. `limits` are checked against the directory
    and during unpacking. `advance` is called after each file with the number of files done.

    Raises:
        UserError: for an archive that is no zip, damaged or truncated, encrypted, hostile (see `_checked`), or too
            large; for a member that exists in `target`; for a full disk. Nothing is left behind.
    """
    with _opened(archive) as opened:
        members = _checked(archive, opened.infolist(), limits)
        contents = _contents(members)
        refuse_clash(contents, target)
        cure = f"choose another folder to unpack {archive} into"
        with user_errors(target, cure=cure, otherwise="cannot be written"), _temporary_folder(target) as folder:
            check_space(target, sum(size for size, _ in contents.values()), f"unpacking {archive.name}")
            _write(archive, opened, members, folder, limits, advance)
            _publish(folder, target)
    return contents


def top_names(contents: Iterable[str]) -> list[str]:
    """First parts of the paths, unique and sorted."""
    return sorted({name.split("/")[0] for name in contents})


def refuse_clash(contents: Iterable[str], target: Path) -> None:
    """Raise `UserError` if `target` holds a file or folder of the same name as a new one."""
    present = [name for name in top_names(contents) if os.path.lexists(target / name)]
    if present:
        raise UserError(
            f"{target / present[0]}: expected nothing there yet, found files that would be overwritten; they were left "
            "alone: move them away, or choose another folder"
        )


def differences(contents: Mapping[str, tuple[int, int]], folder: Path) -> list[str]:
    """Files that are missing below `folder` or differ in size or CRC-32; reads every byte."""
    return [name for name, (size, crc) in contents.items() if not _is_same(folder / name, size, crc)]


def drop_leftovers(target: Path) -> None:
    """Remove temporary folders of killed processes; only while no other process unpacks into `target`."""
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


def _contents(members: Iterable[ZipInfo]) -> Contents:
    return {info.filename: (info.file_size, info.CRC) for info in members if not info.is_dir()}


@contextmanager
def _opened(archive: Path) -> Iterator[ZipFile]:
    if not archive.is_file():
        actual = "a folder" if archive.is_dir() else "nothing"
        raise UserError(f"{archive}: expected a zip archive, found {actual}; name the file as it was downloaded")
    with storage_errors(archive), archive.open("rb") as stream:
        has_magic = stream.read(4) == b"PK\x03\x04"
        try:
            opened = ZipFile(stream)
        except (*_DAMAGE, OSError) as error:  # OSError: seeks to the offset in a damaged directory
            actual = "one that is truncated or damaged" if has_magic else "another kind of file, or a damaged one"
            problem = f"expected a zip archive, got {actual} ({_first_line(error)})"
            raise UserError(f"{archive}: {problem}; {CURE}") from error
        if not _is_complete(stream, len(opened.infolist())):
            raise UserError(f"{archive}: its directory is damaged (members are missing in it); {CURE}")
        with opened:
            yield opened


def _is_complete(stream: BinaryIO, num_members: int) -> bool:
    """Whether the number of members in the end record is that of the directory; zipfile does not check it."""
    stream.seek(max(stream.seek(0, os.SEEK_END) - MAX_TAIL, 0))
    tail = stream.read()
    (count,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\x05\x06") + 10)
    return count in (num_members % (1 << 16), 0xFFFF)  # 0xFFFF: stored in the zip64 record


def _checked(archive: Path, members: Sequence[ZipInfo], limits: Limits) -> list[ZipInfo]:
    """Members to unpack. Raises `UserError` for names, kinds, clashes and sizes that the directory shows as unfit."""
    if len(members) > limits.members:
        raise _refusal(archive, f"{len(members):,} members, at most {limits.members:,} are unpacked")
    chosen = [info for info in members if not info.filename.startswith(JUNK)]
    for info in chosen:
        # `filename` is written; from Python 3.12 on it comes from an extra field. `orig_filename` may hold a NUL.
        for name in (info.orig_filename, info.filename):
            if fault := _name_fault(name) or _kind_fault(info):
                raise _refusal(archive, f"{name[:MAX_NAME]!r}: {fault}")
    if clash := _find_clash(info.filename for info in chosen):
        raise _refusal(archive, clash)
    if all(info.is_dir() for info in chosen):
        raise UserError(f"{archive}: expected files, found none in it; name another archive")
    _check_total(archive, sum(info.file_size for info in chosen), limits)
    return chosen


def _name_fault(name: str) -> str | None:
    """Fault of a member's name, or None."""
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
    if max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > MAX_NAME or len(name) > MAX_PATH:
        return f"a name of more than {MAX_NAME} bytes, or a path of more than {MAX_PATH} letters"
    return f"more than {MAX_DEPTH} folders deep" if len(parts) > MAX_DEPTH else None


def _kind_fault(info: ZipInfo) -> str | None:
    """Fault of a member apart from its name, or None."""
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
    """Two members that are one file on some file system (by case, Unicode form, or file and folder), or None."""
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
    """Raise `UserError` for more unpacked bytes than the limits allow for an archive of this size."""
    if total > limits.total_bytes:
        raise _refusal(archive, f"it unpacks to more than {limits.total_bytes:,} bytes")
    if total > max(limits.ratio * archive.stat().st_size, RATIO_FROM_BYTES):
        raise _refusal(archive, f"it unpacks to more than {limits.ratio} times its size")


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Temporary folder in `target`, on the same file system; an empty `target` created here is removed, too."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # not empty on success
                target.rmdir()


def _write(
    archive: Path, opened: ZipFile, members: Iterable[ZipInfo], folder: Path, limits: Limits, advance: Advance
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


def _blocks(archive: Path, opened: ZipFile, info: ZipInfo) -> Iterator[bytes]:
    """Content of a member in blocks; zipfile compares the CRC at the end."""
    try:
        with opened.open(info) as source:
            while block := source.read(CHUNK_BYTES):
                yield block
    except _DAMAGE as error:
        raise _damaged(archive, info, _first_line(error)) from error


def _publish(folder: Path, target: Path) -> None:
    """Move the content of `folder` to `target`; moved back on failure."""
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


def _damaged(archive: Path, info: ZipInfo, problem: str) -> UserError:
    return UserError(f"{archive}: {info.filename!r} is damaged ({problem}); {CURE}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
