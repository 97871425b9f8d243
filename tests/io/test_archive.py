"""Archives as they should be, damaged ones, and those made to harm."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.io import archive, download
from kmine.io.archive import DEFAULT, differences, read_contents, unpack

FILES = {
    "Set/images/a.jpg": b"a picture" * 500,
    "Set/masks/a.jpg": b"",
    "Set/notes (1).txt": b"caf\xc3\xa9",
    "b.txt": b"b",
}
SMALL = replace(DEFAULT, members=50, total_bytes=3 << 20, ratio=100)


def zipped(files, method=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of (name or ZipInfo, content) pairs; twice the same name is no error here."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as opened:
        warnings.simplefilter("ignore")
        for name, content in files.items() if isinstance(files, dict) else files:
            opened.writestr(name, content)
    return stream.getvalue()


def nameless() -> bytes:
    info, stream = zipfile.ZipInfo("x"), io.BytesIO()
    info.filename = ""
    with zipfile.ZipFile(stream, "w") as opened, opened.open(info, "w") as sink:
        sink.write(b"x")
    return stream.getvalue()


def named(*names: str) -> bytes:
    return zipped([("good.txt", b"good"), *((name, b"x") for name in names)])


def member(name: str, mode: int, content: bytes = b"../../etc/passwd") -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return zipped([("good.txt", b"good"), (info, content)])


def patched(data: bytes, offset: int, new: bytes, *, local: int | None = None) -> bytes:
    """`data` with bytes of the last entry of its directory replaced, and of its local header at `local`, too."""
    entry = data.rindex(b"PK\x01\x02")
    out = bytearray(data)
    out[entry + offset : entry + offset + len(new)] = new
    if local is not None:
        header = struct.unpack_from("<I", data, entry + 42)[0]
        out[header + local : header + local + len(new)] = new
    return bytes(out)


def raw_name(fake: str, true: bytes) -> bytes:
    """A member whose name zipfile itself would not write; `fake` has the same length."""
    assert len(fake) == len(true)
    return patched(named(fake), 46, true, local=30)


STORED = zipped([("good.txt", b"good"), ("x.bin", b"0123456789" * 100)], zipfile.ZIP_STORED)
DEFLATED = zipped({"x.bin": np.random.default_rng(0).bytes(5000) + b"0" * 5000})
ZEROS = zipped({f"{n}.bin": bytes(1 << 20) for n in range(2)})

REFUSED = {
    "absolute path": (named("/etc/passwd"), "absolute"),
    "only a slash": (named("/"), "absolute"),
    "drive letter": (named("C:/windows/x"), "absolute"),
    "drive letter without a slash": (named("c:x"), "absolute"),
    "network path": (raw_name("@@host/x", b"\\\\host/x"), "backslash"),
    "parent": (named("../x"), "leads out"),
    "parent further down": (named("a/b/../../../x"), "leads out"),
    "parent that stays inside": (named("a/../b"), "leads out"),
    "parent as folder": (named("a/../"), "leads out"),
    "parent with backslashes": (raw_name("..@..@x", b"..\\..\\x"), "backslash"),
    "backslash": (raw_name("a@b.txt", b"a\\b.txt"), "backslash"),
    "empty part": (named("a//b"), "empty part"),
    "dot": (named("./a"), "empty part"),
    "no name": (nameless(), "empty part"),
    "NUL as name": (raw_name("@", b"\0"), "control characters"),
    "NUL in the name": (raw_name("a.txt@.exe", b"a.txt\0.exe"), "control characters"),
    "line end in the name": (named("a\nkmine: all is well"), "control characters"),
    "escape sequence in the name": (named("a\x1b[2Jb"), "control characters"),
    "too deep": (named("a/" * 40 + "x"), "32 folders deep"),
    "symbolic link": (member("link", stat.S_IFLNK | 0o777), "symbolic link"),
    "symbolic link to a folder": (member("link/", stat.S_IFLNK | 0o777), "symbolic link"),
    "character device": (member("null", stat.S_IFCHR | 0o666), "device"),
    "block device": (member("sda", stat.S_IFBLK | 0o666), "device"),
    "pipe": (member("pipe", stat.S_IFIFO | 0o666), "device"),
    "socket": (member("socket", stat.S_IFSOCK | 0o666), "device"),
    "folder named like a file": (member("folder", stat.S_IFDIR | 0o755), "file and a folder"),
    "file named like a folder": (member("file/", stat.S_IFREG | 0o644), "file and a folder"),
    "twice": (named("a", "a"), "'a' twice"),
    "differ by case": (named("Set/A.jpg", "set/a.jpg"), "'Set' and 'set', which differ only"),
    "files differ by case": (named("Set/A.jpg", "Set/a.jpg"), "'Set/A.jpg' and 'Set/a.jpg', which differ only"),
    "differ by composition": (named("caf\u00e9", "cafe\u0301"), "differ only"),
    "differ by sharp s": (named("stra\u00dfe", "strasse"), "differ only"),
    "file and folder": (named("a", "a/b"), "'a': a file and a folder"),
    "folder and file": (named("a/b", "a"), "'a': a file and a folder"),
    "too many members": (zipped([(f"{n}", b"") for n in range(51)]), "51 members, at most 50"),
    "too large": (zipped({"x": bytes(SMALL.total_bytes + 1)}, zipfile.ZIP_STORED), "more than 3,145,728 bytes"),
    "too dense": (ZEROS, "more than 100 times its size"),
    "claims to be huge": (patched(DEFLATED, 24, struct.pack("<I", 0xFFFFFFF0)), "more than 3,145,728 bytes"),
    "claims to be larger than it is": (patched(DEFLATED, 24, struct.pack("<I", 20_000)), "damaged"),
    "claims to be smaller than it is": (patched(DEFLATED, 24, struct.pack("<I", 6_000)), "damaged"),
    "claims to be empty": (patched(DEFLATED, 24, struct.pack("<I", 0)), "damaged"),
    "encrypted": (patched(STORED, 8, b"\x01\x00", local=6), "encrypted"),
    "strongly encrypted": (patched(STORED, 8, b"\x41\x00", local=6), "encrypted"),
    "bzip2": (zipped({"x": b"x" * 99}, zipfile.ZIP_BZIP2), "method 12"),
    "unknown method": (patched(STORED, 10, b"\x63\x00", local=8), "method 99"),
    "wrong CRC": (patched(STORED, 16, b"\0\0\0\0", local=14), r"'x.bin' is damaged .*CRC"),
    "changed content, stored": (STORED.replace(b"0123456789", b"0123456780", 1), r"'x.bin' is damaged .*CRC"),
    "changed content, deflated": (DEFLATED[:500] + b"\xff" * 50 + DEFLATED[550:], "'x.bin' is damaged"),
    "another name in the local header": (STORED.replace(b"x.bin", b"y.bin", 1), "'x.bin' is damaged"),
    "local header elsewhere": (patched(STORED, 42, struct.pack("<I", 7)), "'x.bin' is damaged"),
    "truncated": (STORED[:-200], "truncated"),
    "cut in the directory": (STORED[:-30], "truncated"),
    "only its beginning": (STORED[:4], "truncated"),
    "no zip": (b"\x89PNG\r\n\x1a\n" + bytes(100), "another kind of file"),
    "a page of a web server": (b"<html>please log in</html>", "another kind of file"),
    "empty file": (b"", "another kind of file"),
    "directory lost": (STORED[: STORED.index(b"PK\x01\x02")] + STORED[-22:], "truncated or damaged|damaged"),
    "empty archive": (zipped({}), "expected files"),
    "folders only": (zipped([("a/", b"")]), "expected files"),
}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: content of files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def place(tmp_path):
    """Writes an archive; returns it and a target that holds something already."""

    def write(data: bytes) -> tuple[Path, Path]:
        path, target = tmp_path / "in" / "set.zip", tmp_path / "out"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        target.mkdir(exist_ok=True)
        (target / "mine.txt").write_bytes(b"mine")
        return path, target

    return write


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_or_damaged_archive_leaves_nothing(place, tmp_path, case):
    data, said = REFUSED[case]
    path, target = place(data)
    with pytest.raises(UserError, match=said) as caught:
        unpack(path, target, SMALL)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"in": None, "in/set.zip": data, "out": None, "out/mine.txt": b"mine"}
    with pytest.raises(UserError):
        unpack(path, tmp_path / "new", SMALL)
    assert not (tmp_path / "new").exists()


def test_there_are_many_of_them():
    assert len(REFUSED) >= 25


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_sound_archive_arrives_byte_for_byte(place, method):
    path, target = place(zipped({"Set/": b"", "empty/": b""} | FILES, method))
    done = []
    contents = unpack(path, target, SMALL, done.append)
    found = tree(target)
    assert {name: data for name, data in found.items() if data is not None} == FILES | {"mine.txt": b"mine"}
    assert found["empty"] is None
    assert contents == {name: (len(data), zlib.crc32(data)) for name, data in FILES.items()} == read_contents(path)
    assert done == [1, 2, 3, 4]
    assert differences(contents, target) == []


def test_limits_let_pass_what_just_fits(place):
    path, target = place(zipped({"x": bytes(1000)}, zipfile.ZIP_STORED))
    unpack(path, target, replace(SMALL, members=1, total_bytes=1000, ratio=1))
    assert (target / "x").stat().st_size == 1000


def test_a_small_file_may_be_as_dense_as_it_likes(place):
    path, target = place(zipped({"x": bytes(archive.RATIO_FROM_BYTES)}))
    assert path.stat().st_size * 100 < archive.RATIO_FROM_BYTES
    unpack(path, target, SMALL)


def test_bytes_are_counted_as_they_are_written(place, monkeypatch):
    """Whatever the directory says: here one that says nothing."""
    path, target = place(zipped({"x": bytes(4 << 20)}, zipfile.ZIP_STORED))
    monkeypatch.setattr(archive, "_checked", lambda path, members, limits: members)
    written = []
    monkeypatch.setattr(archive, "CHUNK_BYTES", 1 << 16)
    true_check = archive._check_total
    monkeypatch.setattr(archive, "_check_total", lambda p, n, lim: (written.append(n), true_check(p, n, lim)))
    with pytest.raises(UserError, match="more than 3,145,728 bytes"):
        unpack(path, target, SMALL)
    assert len(written) == (3 << 20 >> 16) + 1, "it stopped at the first block too many"
    assert tree(target) == {"mine.txt": b"mine"}


def test_what_macos_adds_is_left_out(place):
    path, target = place(zipped(FILES | {"__MACOSX/Set/._a.jpg": b"junk", "__MACOSX/../../x": b"junk"}))
    assert set(unpack(path, target)) == set(FILES)
    assert not (target / "__MACOSX").exists()


def test_permissions_of_the_archive_are_not_taken_over(place):
    info = zipfile.ZipInfo("tool")
    info.external_attr = (stat.S_IFREG | stat.S_ISUID | 0o777) << 16
    path, target = place(zipped([(info, b"x")]))
    unpack(path, target)
    assert not (target / "tool").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@pytest.mark.parametrize("there", ["Set/images/a.jpg", "Set/other.txt", "b.txt", "Set"])
def test_what_is_there_is_never_overwritten(place, there):
    path, target = place(zipped(FILES))
    (target / there).parent.mkdir(parents=True, exist_ok=True)
    (target / there).write_bytes(b"precious")
    before = tree(target)
    with pytest.raises(UserError, match="would be overwritten"):
        unpack(path, target)
    assert tree(target) == before


def test_a_dangling_link_counts_as_there(place, tmp_path):
    path, target = place(zipped(FILES))
    (target / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="would be overwritten"):
        unpack(path, target)
    assert not (tmp_path / "nowhere").exists()


def test_a_target_that_appears_meanwhile_is_not_overwritten(place):
    path, target = place(zipped(FILES))
    with pytest.raises(UserError, match="would be overwritten"):
        unpack(path, target, advance=lambda done: (target / "b.txt").write_bytes(b"precious"))
    assert tree(target) == {"mine.txt": b"mine", "b.txt": b"precious"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_half_unpacked(place, stop):
    path, target = place(zipped(FILES))

    def interrupt(done: int) -> None:
        assert len(list(target.iterdir())) == 2, "it is under way"
        raise stop

    with pytest.raises(stop):
        unpack(path, target, advance=interrupt)
    assert tree(target) == {"mine.txt": b"mine"}


def test_an_interruption_between_two_moves_takes_the_first_back(place, monkeypatch):
    path, target = place(zipped(FILES))
    true_rename, moved = Path.rename, []

    def rename(self, to):
        moved.append(to)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return true_rename(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, target)
    assert [to.name for to in moved[:2]] == ["Set", "b.txt"]
    assert tree(target) == {"mine.txt": b"mine"}


class FullDisk(io.BytesIO):
    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_is_one_error(place, monkeypatch):
    path, target = place(zipped(FILES))
    true_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk() if mode == "xb" else true_open(self, mode))
    with pytest.raises(UserError, match="the disk is full"):
        unpack(path, target)
    monkeypatch.undo()
    assert tree(target) == {"mine.txt": b"mine"}


def test_space_is_checked_before_anything_is_written(place, monkeypatch):
    path, target = place(zipped(FILES))
    usage = namedtuple("usage", "total used free")
    needed = sum(map(len, FILES.values()))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(0, 0, needed - 1))
    monkeypatch.setattr(archive, "_write", lambda *args: pytest.fail("it wrote"))
    with pytest.raises(UserError, match=r"unpacking set.zip needs .* left"):
        unpack(path, target)
    assert tree(target) == {"mine.txt": b"mine"}


def test_a_folder_and_a_missing_file_are_no_archives(tmp_path):
    for path, came in ((tmp_path, "a folder"), (tmp_path / "no.zip", "nothing")):
        with pytest.raises(UserError, match=f"expected a zip archive, found {came}"):
            unpack(path, tmp_path / "out")


def test_a_target_that_is_a_file_is_one_error(place):
    path, target = place(zipped(FILES))
    with pytest.raises(UserError, match="choose another folder"):
        unpack(path, target / "mine.txt")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "/".join(["x" * 250] * 5)])
def test_a_name_too_long_for_the_file_system_is_one_error(place, name):
    path, target = place(zipped({name: b""}))
    with pytest.raises(UserError, match=r"set\.zip: .*a name of more than 255 bytes, or a path of"):
        unpack(path, target)
    assert tree(target) == {"mine.txt": b"mine"}


def test_a_folder_that_does_not_take_the_files_is_named_with_the_archive(place, monkeypatch):
    path, target = place(zipped({"aux.txt": b""}))
    true_open = Path.open

    def refuse(self, mode):
        if mode == "xb":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true_open(self, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"out: cannot be written .* another folder to unpack {path} into"):
        unpack(path, target)


def unicode_path(name: str, written: str) -> bytes:
    """A member with a Unicode path field (0x7075), whose path Python writes from 3.12 on, in place of `name`."""
    text = written.encode()
    info = zipfile.ZipInfo(name)
    info.extra = struct.pack("<HHBI", 0x7075, len(text) + 5, 1, zlib.crc32(name.encode())) + text
    return zipped([("good.txt", b"good"), (info, b"x")])


@pytest.mark.parametrize("written", ["../evil.png", "/tmp/evil.png", "a/../../evil", "a\\..\\b", "a\rb", "good.txt"])
@pytest.mark.parametrize("python", ["this", "from 3.12 on"])
def test_the_name_that_is_written_is_checked(place, monkeypatch, written, python):
    data = unicode_path("harmless.png", written)
    path, target = place(data)
    if python != "this":
        monkeypatch.setattr(archive, "ZipFile", _renaming(written))
    try:
        unpack(path, target)
    except UserError as error:
        assert str(path) in str(error)
        assert tree(target) == {"mine.txt": b"mine"}
    else:
        assert python == "this"
        assert tree(target) == {"mine.txt": b"mine", "good.txt": b"good", "harmless.png": b"x"}
    assert set(tree(target.parent)) <= {"in", "in/set.zip", "out", *(f"out/{name}" for name in tree(target))}


def test_a_unicode_path_that_is_sound_is_written(place, monkeypatch):
    path, target = place(unicode_path("caf_.png", "café.png"))
    monkeypatch.setattr(archive, "ZipFile", _renaming("café.png"))
    assert set(unpack(path, target)) == {"good.txt", "café.png"}
    assert (target / "café.png").read_bytes() == b"x"


def _renaming(written: str) -> type[zipfile.ZipFile]:
    """Read as Python from 3.12 on: the last member is written under the name of its Unicode path field."""

    class Renaming(zipfile.ZipFile):
        def infolist(self):
            members = super().infolist()
            members[-1].filename = written
            return members

    return Renaming


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_single_wrong_byte_passes_unnoticed(tmp_path, method):
    """Each byte of an archive, one after the other: refused, or the very same files."""
    files = {"S/a": b"some text " * 3, "S/b": b"other", "S/": b""}
    data = zipped(files, method)
    contents = {name: content for name, content in files.items() if content}
    path, refused, target = tmp_path / "set.zip", 0, tmp_path / "out"
    names = set()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        target.mkdir()
        try:
            unpack(path, target)
        except UserError:
            refused += 1
            assert list(target.iterdir()) == []
        else:
            found = {name: content for name, content in tree(target).items() if content is not None}
            assert sorted(found.values()) == sorted(contents.values()), place
            names.add(tuple(sorted(found)))
            archive.shutil.rmtree(target)
        if target.exists():
            target.rmdir()
    assert refused > len(data) / 3
    assert tuple(sorted(contents)) in names


def test_no_cut_passes_unnoticed(tmp_path):
    data = zipped({"S/a": b"some text " * 3, "S/b": b"other"})
    path = tmp_path / "set.zip"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            unpack(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


# -- looking again


def test_differences_are_found_by_name_size_and_content(place):
    path, target = place(zipped(FILES))
    contents = unpack(path, target)
    (target / "b.txt").write_bytes(b"c")
    (target / "Set/images/a.jpg").write_bytes(b"shorter")
    (target / "Set/masks/a.jpg").unlink()
    (target / "Set/more.txt").write_bytes(b"not our concern")
    assert sorted(differences(contents, target)) == ["Set/images/a.jpg", "Set/masks/a.jpg", "b.txt"]


def test_leftovers_of_a_killed_process_are_dropped(place):
    _path, target = place(zipped(FILES))
    (target / f"{archive.UNFINISHED}x" / "Set").mkdir(parents=True)
    archive.drop_leftovers(target)
    assert tree(target) == {"mine.txt": b"mine"}
