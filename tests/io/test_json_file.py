"""JSON files of users: what is no regular file, no JSON, too large or too deep is one error that names the file."""

from __future__ import annotations

import json
import os

import pytest

from kmine.errors import UserError
from kmine.io.json_file import MAX_DEPTH, json_field, kind_of, load_json, parse_json

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "as JSON, got something else"),
        (b"<html>", "as JSON, got something else"),
        (b'"\xff"', "as JSON, got something else"),
        (b'"\\ud800"', "as JSON, got something else"),
        (b"1" * 5000, "got something else|None"),
        (DEEP.encode(), "nested too deeply"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deeply"),
        (b" " * 101, "at most 100 bytes, got more"),
    ],
    ids=["empty", "page", "no UTF-8", "surrogate", "long number", "deep", "too deep", "large"],
)
def test_other_content_is_refused_by_name(tmp_path, content, problem):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    if problem.endswith("None"):
        assert load_json(path, "verdicts", "save again", 10_000) is None
        return
    with pytest.raises(UserError, match=problem) as error:
        load_json(path, "verdicts", "save again", 100 if b" " in content else 10**6)
    assert str(error.value).startswith(f"{path}: expected verdicts") and str(error.value).endswith("; save again")


def test_folders_pipes_devices_and_missing_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    for name, problem in {".": "a folder", "pipe": "a pipe", "/dev/zero": "device", "none": "No such file",
                          "link": "symbolic links", "nul\0": "null byte"}.items():  # fmt: skip
        with pytest.raises(UserError, match=problem):
            load_json(tmp_path / name, "verdicts", "save again")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_is_read(tmp_path, encoding):
    (tmp_path / "a.json").write_text('{"né": [1, "\\ud83d\\ude00"]}', encoding)
    assert load_json(tmp_path / "a.json", "x", "y") == {"né": [1, "😀"]}


def test_numbers_that_json_lacks_are_null():
    assert parse_json("[NaN, -Infinity, 1e999, 18446744073709551616, 1e3, 18446744073709551615]", "x", "y", "z") == [
        None
    ] * 4 + [1e3, 2**64 - 1]
    parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x", "y", "z")


def test_a_field_of_another_kind_is_named():
    assert json_field({"n": 3}, "n", float, where="f", cure="c") == 3
    assert json_field({}, "n", int, type(None), where="f", cure="c") is None
    for value, kinds, text in (
        ({"n": True}, (int,), "expected `n` to be a whole number, got true"),
        ({"n": 1.5}, (int, str), "expected `n` to be a whole number or text, got 1.5"),
        ({"n": []}, (dict,), "expected `n` to be an object, got a list"),
        ({"n": "x" * 99}, (list,), "expected `n` to be a list, got text"),
        ({}, (bool,), "expected `n` to be true or false, got null or NaN"),
        ([], (bool,), "expected an object with `n`, got a list"),
    ):
        with pytest.raises(UserError) as error:
            json_field(value, "n", *kinds, where="f", cure="c")
        assert str(error.value) == f"f: {text}; c"
    assert [kind_of(v) for v in json.loads('[true, 1, "a", null]')] == ["true", "1", '"a"', "null or NaN"]
