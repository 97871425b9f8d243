"""A source without files works like any other; checks of files that all data sets share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.memory_source import MemorySource, noise_source

from kmine.data import source as module
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.data.source import (
    Source,
    choose_task,
    csv_rows,
    fingerprint_files,
    is_file,
    is_folder,
    require_file,
    size_and_time,
    stop_or_skip,
)
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError


def test_arrays_in_memory_are_split_cached_and_read(tmp_path):
    source: Source = noise_source(10)
    cache = SampleCache(source, 16, tmp_path)
    splits = make_splits(cache.refs, label_fraction=0.5, val_fraction=0.2, test_fraction=0, split_seed=0, seed=0)
    pool = Pool(cache, splits.labeled, splits.groups, "true")
    sample = pool.sample(pool.ids[0])
    np.testing.assert_array_equal(sample.image, source.image(sample.sample_id))
    np.testing.assert_array_equal(sample.mask, source.mask(sample.sample_id))
    assert pool.image_resized(pool.ids[0]).shape == (16, 16, 3)
    assert source.slice_location(pool.ids[0]) is None


def test_arrays_in_memory_are_cached_by_their_content(tmp_path):
    image = np.zeros((4, 5, 3), np.uint8)
    sources = [MemorySource({"a": array}, {}) for array in (image, image.copy(), image + 1)]
    first, equal, other = (SampleCache(source, 8, tmp_path) for source in sources)
    assert first.folder == equal.folder != other.folder
    assert sources[1].reads == [] and other.image_resized("a").min() == 1


def test_auto_is_the_first_task():
    assert choose_task("auto", "lits", ("tumour", "liver")) == "tumour"
    assert choose_task("liver", "lits", ("tumour", "liver")) == "liver"
    with pytest.raises(UserError, match="expected auto or one of tumour, liver for lits, got 'lung'"):
        choose_task("lung", "lits", ("tumour", "liver"))


def test_fingerprints_follow_settings_names_sizes_and_times_but_not_order(tmp_path):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text("x")
    first = fingerprint_files({"k": 1}, tmp_path, files)
    assert fingerprint_files({"k": 1}, tmp_path, files[::-1]) == first
    seen = {first, fingerprint_files({"k": 2}, tmp_path, files), fingerprint_files({"k": 1}, tmp_path, files[:1])}
    os.utime(files[0], ns=(1, 1))
    seen.add(fingerprint_files({"k": 1}, tmp_path, files))
    files[0].write_text("xy")
    os.utime(files[0], ns=(1, 1))
    seen.add(fingerprint_files({"k": 1}, tmp_path, files))
    assert len(seen) == 5 and size_and_time(files[0]) == (2, 1) and size_and_time(tmp_path / "c") == (-1, -1)


def test_only_a_file_with_content_may_be_opened(tmp_path):
    good = tmp_path / "good"
    good.write_text("123")
    assert require_file(good, "an image") == 3
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {
        "empty": "got an empty file (0 bytes)",
        "folder": "got a folder",
        "broken": "found a link to nothing",
        "circle": "cannot be read",
        "pipe": "got a pipe, socket or device",
        "gone": "found no such file",
    }.items():
        with pytest.raises(SampleError) as error:
            require_file(tmp_path / name, "an image")
        assert str(error.value).startswith(f"{tmp_path / name}: ") and problem in str(error.value)
    assert is_file(good) and is_folder(tmp_path / "folder")
    impossible = Path("a\0b")
    assert not is_file(impossible) and not is_folder(impossible)


def test_rows_of_a_table_are_read_with_their_lines(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfa, b\r\n\r\n , \r\n"x, y",1\r\n')
    assert list(csv_rows(path, "data.csv")) == [(1, ["a", "b"]), (4, ["x, y", "1"])]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a;b\n1;2,5\n", [(1, ["a", "b"]), (2, ["1", "2,5"])]),
        ("a\tb\n1\t2\n", [(1, ["a", "b"]), (2, ["1", "2"])]),
        ("a,b;c\n1,2\n", [(1, ["a", "b;c"]), (2, ["1", "2"])]),
        ("a\nx;y\n", [(1, ["a"]), (2, ["x;y"])]),
        (",a,b\n0,x,1\n1.0,y,\n", [(1, ["a", "b"]), (2, ["x", "1"]), (3, ["y", ""])]),
        ("Unnamed: 0.1,a,,\n7,x,,\n", [(1, ["a"]), (2, ["x"])]),
        ("Unnamed: 0,a\n7,x\n", [(1, ["a"]), (2, ["x"])]),
        ("a\r 1 \r", [(1, ["a"]), (2, ["1"])]),
    ],
)
def test_separators_and_columns_of_row_numbers(tmp_path, text, rows):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    assert list(csv_rows(path, "data.csv")) == rows


def test_a_column_without_a_name_may_hold_row_numbers_only(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("image,,group\na.png,m.png,1\n")
    with pytest.raises(
        UserError, match=r"table.csv, line 2: expected a row number in the column without a name, got 'm"
    ):
        list(csv_rows(path, "data.csv"))


@pytest.mark.parametrize("content", [b"a,b\n\0,1\n", "a,b\n".encode("utf-16")])
def test_other_bytes_are_no_table(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"table.csv: expected a CSV file in UTF-8"):
        list(csv_rows(path, "data.csv"))


def test_a_table_is_limited_in_size_and_csv_in_utf_8(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    for content in (b"gr\xf6", b'a,"b'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"table.csv: expected a CSV file in UTF-8, got something else"):
            list(csv_rows(path, "data.csv"))
    with pytest.raises(UserError, match=r"data.csv: .*gone: expected a CSV file, found no such file"):
        list(csv_rows(tmp_path / "gone", "data.csv"))
    monkeypatch.setattr(module, "MAX_TABLE", 3)
    with pytest.raises(UserError, match=r"data.csv: .*: expected a table of at most 3 bytes, got 4; split it"):
        list(csv_rows(path, "data.csv"))


def test_a_damaged_sample_stops_or_is_listed():
    error = SampleError("a.png", "expected an image")
    assert stop_or_skip("a", error, "skip").problem == "expected an image"
    with pytest.raises(SampleError, match=r"a\.png: expected an image; or pass --data\.on_error skip"):
        stop_or_skip("a", error, "stop")
