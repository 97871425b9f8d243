"""Files written whole or not at all, and signatures."""

from __future__ import annotations

import csv
import errno
import os

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.io.files import atomic_open, class_colours, lock, open_lock, refuse_links, sign, write_atomic, write_csv


def failing(number: int):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(broken, failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, mode):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old\n")
    with pytest.raises(ValueError, match="no more rows"), atomic_open(path, mode) as file:
        file.write("new\n" if mode == "w" else b"new\n")
        raise ValueError("no more rows")
    assert path.read_bytes() == b"old\n" and list(path.parent.iterdir()) == [path]
    with atomic_open(path, mode) as file:
        file.write("né\r\n" if mode == "w" else "né\r\n".encode())
    assert path.read_bytes() == "né\r\n".encode()


def test_signatures_differ_by_value_type_and_order():
    values = [(1,), ("1",), (1.5,), (None,), ([1, 2],), ([2, 1],), ({"a": 1},), (1, 2), ()]
    assert len({sign(*v) for v in values}) == len(values)
    assert sign({"a": 1, "b": 2}) == sign({"b": 2, "a": 1})
    assert len(sign()) == 16


def test_tables_hold_any_text(tmp_path):
    rows = [["a\rb", "c\nd"], ['e"f', "=1+1"], ["g,h", " lead "], ["k\u2028l", "\r\n"], ["plain", ""]]
    write_csv(tmp_path / "t.csv", ("x", "y"), rows)
    content = (tmp_path / "t.csv").read_bytes()
    assert content.startswith(b'x,y\n"a\rb","c\nd"\n') and content.endswith(b'"\r\n"\nplain,\n')
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "y"], *rows]


def test_a_name_that_is_not_utf_8_is_written_with_question_marks(tmp_path):
    write_csv(tmp_path / "t.csv", ["x"], [["k\udcff"]])
    assert (tmp_path / "t.csv").read_text("utf-8") == "x\nk?\n"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.with_name("a"))], ids=["pipe", "link"])
def test_a_lock_is_a_plain_file(tmp_path, make):
    path = tmp_path / ".lock"
    with open_lock(path), open_lock(path):
        assert path.read_bytes() == b""
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=r"\.lock: expected a file or folder of kmine's own, got a "):
        open_lock(path)
    assert not (tmp_path / "a").exists()


def test_a_lock_holds_until_its_file_is_closed(tmp_path):
    with open_lock(tmp_path / ".lock") as first, open_lock(tmp_path / ".lock") as second:
        lock(first, wait=False)
        with pytest.raises(BlockingIOError):
            lock(second, wait=False)
        first.close()
        lock(second, wait=True)


def test_a_pipe_anywhere_below_a_folder_is_refused(tmp_path):
    (tmp_path / "round_0").mkdir()
    refuse_links([tmp_path])
    os.mkfifo(tmp_path / "round_0" / "metrics.json")
    with pytest.raises(UserError, match=r"metrics\.json: .* got a pipe, socket or device; remove it"):
        refuse_links([tmp_path])


def test_classes_have_different_colours_that_are_never_black():
    colours = class_colours(256)
    assert colours[0].tolist() == [0, 0, 0] and colours[255].tolist() == [128, 128, 128]
    assert (colours[1:] > 0).any(axis=1).all() and len({tuple(c) for c in colours[:31].tolist()}) == 31
    assert np.array_equal(class_colours(3), colours[:3]) and colours[1, 0] < min(colours[1, 1:])
