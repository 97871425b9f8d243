"""Settings files: what YAML would change stays as written; damage is one line; nothing unfolds without end."""

from __future__ import annotations

import os
import time
from datetime import date
from pathlib import Path
from threading import Thread

import pytest

from kmine.errors import UserError
from kmine.io.yaml_file import MAX_BYTES, read_yaml


def read(tmp_path: Path, text: str | bytes, *, as_text: bool = True) -> dict[str, object]:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path, str(path), "restore it", as_text=as_text)


def test_scalars_stay_as_they_are_written(tmp_path):
    text = "a: 007\nb: no\nc: 2024-01-01\nd: 1:30\ne: '~'\nf: ~\ng: [1, on]\nh:\n"
    expected = {"a": "007", "b": "no", "c": "2024-01-01", "d": "1:30", "e": "~", "f": None, "g": ["1", "on"], "h": None}
    assert read(tmp_path, text) == expected


def test_without_as_text_values_have_the_types_of_yaml(tmp_path):
    assert read(tmp_path, "a: 8\nb: no\nc: 2024-01-01\n", as_text=False) == {"a": 8, "b": False, "c": date(2024, 1, 1)}


def test_aliases_of_sections_and_lists_are_read(tmp_path):
    text = "a: &a {x: 1, y: [2]}\nb: *a\nc: &c\n  <<: *a\n  y: &l [3]\nd: {<<: [*c, *a], z: *l}\n"
    section = {"x": "1", "y": ["2"]}
    expected = {"a": section, "b": section, "c": {"x": "1", "y": ["3"]}, "d": {"x": "1", "y": ["3"], "z": ["3"]}}
    assert read(tmp_path, text) == expected
    longer = text.replace("y", "long_name")  # the library takes names of one letter and others apart
    assert read(tmp_path, longer)["d"] == {"x": "1", "long_name": ["3"], "z": ["3"]}


def test_an_alias_of_a_value_and_a_merged_section_are_read(tmp_path):
    assert read(tmp_path, "a: &x 3\nb: *x\nc:\n  <<: {d: 1}\n") == {"a": "3", "b": "3", "c": {"d": "1"}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"b{n}: &b{n} [*{m}, *{m}]\n" for n, m in enumerate(["a", *(f"b{n}" for n in range(20))])),
            "line 16, column 6: not YAML (aliases of more than 100,000 values); mend that line",
        ),
        ("a: &a {b: *a}\n", "line 1, column 11: not YAML (an alias of the section that it stands in)"),
        ("a: &a\n  <<: *a\n", "line 2, column 7: not YAML (an alias of the section that it stands in)"),
        ("a: {<<: 3}\n", "line 1, column 9: not YAML (<< takes a section)"),
        ("data: {size: 64}\ndata: {size: 32}\n", "line 2, column 1: not YAML (data stands there twice)"),
        ("a: !!python/object/apply:os.system [true]\n", "line 1, column 4: not YAML (could not determine"),
        ("a: " + "[" * 3000, "expected names and values, got others (RecursionError); restore it"),
        ("a" * (MAX_BYTES + 1), "expected settings, got more than 256 KiB; restore it"),
        (b"a: \x00\n", "not YAML (unreadable)"),
        (b"a: \xff\n", "expected a text file, got other bytes"),
        ("", "expected lines `name: value`, got nothing"),
    ],
    ids=[
        "unfolds",
        "alias of itself",
        "merge of itself",
        "merge of a value",
        "twice",
        "object",
        "deep",
        "huge",
        "nul",
        "bytes",
        "empty",
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, text, problem):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'a.yaml'}: {problem}")
    assert "\n" not in str(error.value)


def test_a_date_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(UserError, match="expected names and values, got others"):
        read(tmp_path, "a: 2024-13-45\n", as_text=False)


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: expected lines `name: value`, got nothing; restore it"):
        read_yaml(tmp_path / "a.yaml", str(tmp_path / "a.yaml"), "restore it")


def test_a_pipe_is_read_to_its_end_and_one_without_a_writer_is_not_waited_for(tmp_path):
    reader, writer = os.pipe()

    def write() -> None:
        time.sleep(0.2)
        os.write(writer, b"a: 1\n")
        os.close(writer)

    thread = Thread(target=write)
    thread.start()
    try:
        assert read_yaml(f"/dev/fd/{reader}", "--config", "give a file") == {"a": 1}
    finally:
        thread.join()
        os.close(reader)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="expected lines `name: value`, got nothing; give a file"):
        read_yaml(tmp_path / "pipe", "--config", "give a file")
