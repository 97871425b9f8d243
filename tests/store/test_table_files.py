"""Tables on disk: read group by group, by sample, joined from parts; damaged files."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kmine.errors import UserError
from kmine.store.artifacts import DamagedError
from kmine.store.table_files import GROUP_ROWS, RowsBySample, TableRows, encode_table, join_tables, open_table
from kmine.store.tables import DecisionRow

COUNT = 2 * GROUP_ROWS + 30


def decisions(count: int) -> list[DecisionRow]:
    return [DecisionRow(f"i{n // 2:04}", n % 2, 1, True, "kept", in_training=n % 4 == 0) for n in range(count)]


def write(path: Path, rows: list[DecisionRow], signature: str = "s") -> Path:
    path.write_bytes(encode_table(rows, DecisionRow, signature))
    return path


def joined(folder: Path, step: int, most: int | None = None) -> list[Path]:
    rows = decisions(COUNT)
    starts = range(0, COUNT, step)
    parts = [write(folder / f"part{step}-{first}", rows[first : first + step]) for first in starts]
    outs = [folder / f"joined{step}-{n}" for n in range(5)]
    return join_tables(parts, DecisionRow, "s", outs, most)


def test_rows_by_sample_are_those_of_the_table(tmp_path):
    rows = [DecisionRow(i, n, 1, True, "kept", in_training=i == "a") for i, n in (("a", 0), ("a", 1), ("b", 0))]
    by_sample = RowsBySample(TableRows([write(tmp_path / "t", rows)], DecisionRow))
    assert {i: by_sample[i] for i in by_sample} == {"a": rows[:2], "b": rows[2:]}
    assert by_sample.firsts("in_training") == {"a": True, "b": False}
    assert "c" not in by_sample and by_sample.get("c") is None and by_sample["a"] is by_sample["a"]
    assert not RowsBySample(TableRows([], DecisionRow))


def test_rows_of_several_groups_and_files_are_read_in_any_order(tmp_path):
    rows = decisions(COUNT)
    table = TableRows([write(tmp_path / "a", rows[:300]), write(tmp_path / "b", rows[300:])], DecisionRow)
    assert (
        len(table) == COUNT and list(table) == rows and table.column("object_idx") == [row.object_idx for row in rows]
    )
    for first, length in ((0, 1), (GROUP_ROWS - 1, 2), (298, 4), (COUNT - 1, 1), (250, 290)):
        assert table.slice(first, length) == rows[first : first + length]
    by_sample = RowsBySample(table)
    assert by_sample["i0149"] == rows[298:300] and by_sample["i0150"] == rows[300:302]
    with pytest.raises(IndexError):
        table[COUNT]


def test_joined_files_hold_the_rows_in_order_and_do_not_depend_on_the_parts(tmp_path):
    (one,), (other,), shards = joined(tmp_path, 7), joined(tmp_path, 301), joined(tmp_path, 16, 1)
    assert one.read_bytes() == other.read_bytes() and list(TableRows([one], DecisionRow)) == decisions(COUNT)
    assert [pq.read_metadata(path).num_rows for path in shards] == [GROUP_ROWS, GROUP_ROWS, 30]
    assert list(open_table(shards, DecisionRow, "s")) == decisions(COUNT)
    empty = join_tables([write(tmp_path / "none", [])], DecisionRow, "s", [tmp_path / "empty"], 1)
    assert len(empty) == 1 and not TableRows(empty, DecisionRow)


def test_a_damaged_file_is_not_opened_or_one_line(tmp_path):
    path = write(tmp_path / "t", decisions(COUNT))
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert open_table([path], DecisionRow, "s") is None
        with pytest.raises(DamagedError, match=f"^{path}: damaged"):
            TableRows([path], DecisionRow)
    third = len(whole) // 3
    path.write_bytes(whole[:third] + bytes([whole[third] ^ 0xFF]) + whole[third + 1 :])
    assert open_table([path], DecisionRow, "s") is None
    with pytest.raises(DamagedError):
        list(TableRows([path], DecisionRow))
    assert open_table([path.with_name("none")], DecisionRow, "s") is None
    with pytest.raises(UserError, match="got a folder"):
        TableRows([tmp_path], DecisionRow)
