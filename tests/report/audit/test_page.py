"""The page of an audit as written: streamed, escaped, complete or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.audit_items import (
    EVIL,
    HOSTILE,
    item,
    items,
    write,
)

from kmine.report.audit import page as audit_page
from kmine.report.audit.page import Layer, script_json, write_page

WORDS = {"title": "t", "run_name": "r", "run_signature": "s", "class_names": ("b", "o"), "summary": {}, "figures": {}}


def test_script_json_cannot_end_a_script_and_is_read_back_equal():
    value = [*HOSTILE, os.fsdecode(b"\xff")]
    text = script_json(value)
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == value


def test_page_and_data_hold_no_markup_of_the_run(tmp_path):
    page = write(tmp_path).read_text("utf-8")
    assert EVIL not in page and "<img src=x" not in page
    for path in (tmp_path / "audit_data").glob("[im][na]*_*.js"):
        assert "<" not in path.read_text("ascii")
    assert "http://" not in page and "https://" not in page and "//" not in page.replace("<!doctype", "")


def test_items_are_streamed_and_files_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_page, "DETAIL_ROWS", 2)
    monkeypatch.setattr(audit_page, "INDEX_ROWS", 4)
    written = []
    real = audit_page._write_script
    monkeypatch.setattr(audit_page, "_write_script", lambda *a: (written.append((a[1], a[2], len(read))), real(*a)))
    read = []

    def stream():
        for number in range(5):
            read.append(number)
            yield item(number)

    write_page(tmp_path, stream(), **WORDS)
    assert written == [("masks", 0, 2), ("masks", 1, 4), ("index", 0, 4), ("masks", 2, 5), ("index", 1, 5)]


def test_a_shorter_page_removes_surplus_data_files_only(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_page, "DETAIL_ROWS", 20)
    write(tmp_path)
    (tmp_path / "audit_data" / "mine.txt").write_text("stays")
    assert (tmp_path / "audit_data" / "masks_3.js").exists()
    write(tmp_path, items()[:5])
    assert [path.name for path in sorted((tmp_path / "audit_data").glob("masks_*"))] == ["masks_0.js"]
    assert (tmp_path / "audit_data" / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"audit.html", "audit_data", "pictures"}


def test_an_interrupted_page_leaves_the_one_before(tmp_path):
    page = write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stream():
        yield item(1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_page(tmp_path, stream(), **WORDS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert page.exists()


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ([item(1), item(1)], "twice"),
        ([item(1, "stranger")], "kind"),
        ([item(1, layers=(Layer("other", 1, ""),))], "layers"),
        ([item(1, picture="//elsewhere/a.png")], "relative"),
    ],
)
def test_invalid_items_are_refused(tmp_path, found, match):
    with pytest.raises(ValueError, match=match):
        write(tmp_path, found)


def test_scripts_styles_and_templates_are_packaged():
    here = Path(audit_page.__file__).parent
    packaged = (here.parents[2] / "pyproject.toml").read_text("utf-8")
    suffixes = {path.suffix for path in here.glob("audit*")}
    assert suffixes == {".jinja", ".css", ".js"}
    assert all(f'"report/audit/*{suffix}"' in packaged for suffix in suffixes)
    assert {path.name for path in here.glob("*.js")} == set(audit_page._SCRIPTS)


def test_nan_and_infinity_become_null(tmp_path):
    write(tmp_path, [item(1, suspicion=float("nan"), facts={"a": np.float32("inf"), "b": np.int64(3), "c": None})])
    text = (tmp_path / "audit_data" / "index_0.js").read_text()
    assert json.loads(text[text.index("{") : text.rindex("}") + 1])["rows"][0][3:4] == [None]
    assert text.rstrip().endswith('"sig1",null,3,null]]});')
