"""Files of a cache: index and records are read back, or their damage is named."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kmine.data.cache.files import (
    Entry,
    Index,
    allocate,
    cache_errors,
    locked,
    read_index,
    read_record,
    write_index,
    write_record,
)
from kmine.errors import UserError
from kmine.types import Skipped

SIGNATURE = {"fingerprint": "ab", "size": 2}
INDEX = Index({"s0": Entry("s0", 0, 4, 5, 2**64 - 1, 7)}, (Skipped("s1", "s1.png", "broken"),))


def test_an_index_is_read_back(tmp_path):
    write_index(tmp_path, SIGNATURE, INDEX)
    assert read_index(tmp_path, SIGNATURE, {}) == INDEX


def test_an_invalid_index_is_named(tmp_path):
    assert read_index(tmp_path, SIGNATURE, {}) == "index.json is missing or unreadable"
    write_index(tmp_path, SIGNATURE, INDEX)
    allocate(tmp_path / "images.u8", 12, reserve=True)
    assert read_index(tmp_path, SIGNATURE, {"images.u8": 24}) == "images.u8 has 12 bytes instead of 24"
    assert read_index(tmp_path, SIGNATURE, {"masks.u8": 1}) == "masks.u8 is missing or unreadable"
    assert "other data" in str(read_index(tmp_path, SIGNATURE | {"size": 3}, {}))
    (tmp_path / "index.json").write_bytes((tmp_path / "index.json").read_bytes()[:-1])
    assert read_index(tmp_path, SIGNATURE, {}) == "index.json is damaged"


def test_records_are_written_in_place(tmp_path):
    path = tmp_path / "masks.u8"
    assert read_record(path, 0, (2, 3)) is None
    allocate(path, 18, reserve=False)
    record = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write_record(path, 1, record)
    np.testing.assert_array_equal(read_record(path, 1, (2, 3)), record)
    assert not read_record(path, 0, (2, 3)).any() and not read_record(path, 2, (2, 3)).any()
    assert read_record(path, 3, (2, 3)) is None and path.stat().st_size == 18


def test_a_lock_is_exclusive(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "lock"):
            order.append("second")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_errors_name_the_folder_and_the_cure(tmp_path):
    with (
        pytest.raises(
            UserError,
            match=rf"{tmp_path}: cannot store decoded images \(.*\); name another folder: --data.cache_dir of loop",
        ),
        cache_errors(tmp_path),
    ):
        (tmp_path / "missing/file").write_text("")
