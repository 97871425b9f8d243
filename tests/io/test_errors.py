"""Errors of the file system as one line with the cure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kmine.errors import UserError
from kmine.io.errors import ANOTHER_FOLDER, RERUN, storage_errors, user_errors

PATH = Path("out/run.json")


def message_of(manager, number: int) -> str:
    with pytest.raises(UserError) as caught, manager:
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.EACCES, "no permission to write there"),
        (errno.EPERM, "no permission to write there"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.EEXIST, "a file stands where a folder is needed"),
        (errno.ENAMETOOLONG, "the name is too long for this file system"),
    ],
)
def test_a_refused_write_names_path_problem_and_cure(number, problem):
    assert message_of(user_errors(PATH), number) == f"out/run.json: {problem}; choose another --out"
    assert message_of(storage_errors(PATH), number) == f"out/run.json: {problem}; {ANOTHER_FOLDER}"


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up; free some space"),
        (errno.EFBIG, "the file would be larger than the limit for one file; raise it (ulimit -f)"),
    ],
)
def test_the_cure_of_a_full_disk_is_free_space(number, problem):
    expected = f"out/run.json: {problem} {RERUN}"
    assert message_of(user_errors(PATH, cure="unused", otherwise="unused"), number) == expected
    assert message_of(storage_errors(PATH), number) == expected


def test_other_errors_pass_through_unless_a_problem_is_given():
    with pytest.raises(OSError, match="Input/output") as caught, user_errors(PATH):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, UserError)
    expected = f"out/run.json: cannot be read or written ({os.strerror(errno.EIO)}); {ANOTHER_FOLDER}"
    assert message_of(storage_errors(PATH), errno.EIO) == expected


def test_an_error_without_a_number_is_reported_by_its_text():
    with pytest.raises(UserError, match=r"cannot be read or written \(odd\)"), storage_errors(PATH):
        raise OSError("odd")


def test_what_is_no_file_system_error_passes_through():
    with pytest.raises(KeyError, match="a"), storage_errors(PATH):
        raise KeyError("a")
    with user_errors(PATH):
        pass
