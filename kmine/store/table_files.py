"""Parquet files of a run folder, written and read a group of rows at a time."""

from __future__ import annotations

import io
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from types import UnionType
from typing import Any, Generic, get_args, get_origin, get_type_hints

from kmine.io.files import atomic_open
from kmine.io.json_file import read_regular
from kmine.store.artifacts import CURE, DamagedError
from kmine.store.tables import R
from kmine.types import EVIDENCE_COLUMNS, Evidence

GROUP_ROWS, CACHED_GROUPS = 256, 32  # rows that are read at once, in a millisecond, and groups of them in memory


class TableRows(Sequence[R], Generic[R]):
    """The rows of Parquet files, one file after the other; read and checked by groups, as all would fill the memory.

    Raises:
        DamagedError: for a file that is no table of `row_type`, and where a damaged row is read.
    """

    def __init__(self, paths: Sequence[Path], row_type: type[R]) -> None:
        import pyarrow as pa

        self._row_type, self._groups, self._ends = row_type, list[tuple[Path, Any, int]](), [0]
        self.signatures: set[str] = set()  # of the files
        for path in paths:
            with _opened(path) as file:
                _check_columns(file.schema_arrow, _schema(pa, row_type))
                found = (file.schema_arrow.metadata or {}).get(b"signature", b"")
                self.signatures.add(found.decode("ascii", "replace"))
                for n in range(file.num_row_groups):
                    self._groups.append((path, file.metadata, n))
                    self._ends.append(self._ends[-1] + file.metadata.row_group(n).num_rows)
        self._group = lru_cache(CACHED_GROUPS)(partial(_read_group, self._groups))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: Any) -> Any:
        return self.slice(place, 1)[0]

    def __iter__(self) -> Iterator[R]:
        for first in range(0, len(self), GROUP_ROWS):
            yield from self.slice(first, min(GROUP_ROWS, len(self) - first))

    def slice(self, first: int, length: int) -> list[R]:
        """`length` rows from number `first` on. `IndexError` where there are not as many."""
        found: list[R] = []
        n = bisect_right(self._ends, first) - 1
        while len(found) < length:
            rows = self._group(n).slice(first + len(found) - self._ends[n], length - len(found)).to_pylist()
            found += map(self._row_type.from_arrow, rows)
            n += 1
        return found

    def column(self, name: str) -> list[Any]:
        """Values of a column."""
        values: list[Any] = []
        for path in dict.fromkeys(path for path, *_ in self._groups):
            with _opened(path) as file:
                values += file.read([name], use_threads=False)[name].to_pylist()
        return values


class RowsBySample(Mapping[str, list[R]], Generic[R]):
    """The rows of each sample, in the table's order, which has the rows of a sample one after the other."""

    def __init__(self, rows: TableRows[R]) -> None:
        names = rows.column("sample_id")
        firsts = [n for n, name in enumerate(names) if not n or name != names[n - 1]]
        self._rows, self._firsts = rows, array("q", [*firsts, len(names)])
        self._places = {names[first]: n for n, first in enumerate(firsts)}
        self._last: tuple[str, list[R]] | None = None

    def __getitem__(self, sample_id: str) -> list[R]:
        n, last = self._places[sample_id], self._last  # which another thread may replace
        if last is None or last[0] != sample_id:
            first, end = self._firsts[n : n + 2]
            self._last = last = sample_id, self._rows.slice(first, end - first)
        return last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def firsts(self, column: str) -> dict[str, Any]:
        """Value of a column in the first row of each sample."""
        values = self._rows.column(column)
        return {name: values[self._firsts[n]] for name, n in self._places.items()}


def encode_table(rows: Sequence[R], row_type: type[R], signature: str) -> bytes:
    """Parquet bytes of a table, with the signature in its metadata."""
    import pyarrow as pa

    buffer = io.BytesIO()
    table = pa.Table.from_pylist([row.to_arrow() for row in rows], _schema(pa, row_type))
    _write(buffer, [table], row_type, signature)
    return buffer.getvalue()


def join_tables(
    paths: Iterable[Path], row_type: type[R], signature: str, outs: Iterable[Path], most: int | None = None
) -> list[Path]:
    """Write the rows of files into the first of `outs`, `most` groups of `GROUP_ROWS` rows each; returns these files.

    The bytes depend on the rows alone, not on the files they come from.
    """
    groups, names, written = _regrouped(paths), iter(outs), list[Path]()
    while (ahead := [*islice(groups, 1)]) or not written:
        written.append(next(names))
        with atomic_open(written[-1]) as file:
            _write(file, chain(ahead, islice(groups, most and most - len(ahead))), row_type, signature)
    return written


def open_table(paths: Sequence[Path], row_type: type[R], signature: str) -> TableRows[R] | None:
    """Rows of files, all of them read once; None where a file is missing, damaged or has another signature."""
    if not all(os.path.lexists(path) for path in paths):
        return None
    try:
        rows = TableRows(paths, row_type)
        for n in range(len(rows._groups) if rows.signatures <= {signature} else 0):
            _read_group(rows._groups, n)
    except DamagedError:
        return None
    return rows if rows.signatures <= {signature} else None


def _read_group(groups: Sequence[tuple[Path, Any, int]], number: int) -> Any:
    """Group `number` as an Arrow table."""
    path, metadata, n = groups[number]
    with _opened(path, metadata) as file:
        table = file.read_row_group(n, use_threads=False)
        table.validate(full=True)  # finds text that is not UTF-8, before rows are made of it
        return table


@contextmanager
def _opened(path: Path, metadata: Any = None) -> Iterator[Any]:
    """A `ParquetFile` (`pq.read_table` would load pandas); errors of reading in the block become a `DamagedError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (path.is_file() and os.access(path, os.R_OK)):
        read_regular(path, "a table of the run", CURE)  # raises: a folder, a pipe, which would wait
    try:
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, MemoryError) as error:
        raise DamagedError(path, str(error).split("\n")[0][:200]) from error


def _write(file: Any, tables: Iterable[Any], row_type: type[R], signature: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa, row_type).with_metadata({"signature": signature})
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), GROUP_ROWS)


def _regrouped(paths: Iterable[Path]) -> Iterator[Any]:
    """Tables of `GROUP_ROWS` rows, the last of fewer, of the rows of files."""
    import pyarrow as pa

    waiting: list[Any] = []
    for path in paths:
        with _opened(path) as file:
            waiting.append(file.read(use_threads=False))
        while sum(map(len, waiting)) >= GROUP_ROWS:
            table = pa.concat_tables(waiting).combine_chunks()
            yield table.slice(0, GROUP_ROWS)
            waiting = [table.slice(GROUP_ROWS)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _check_columns(actual: Any, expected: Any) -> None:
    """Raise `ValueError` for columns of other types, or without those of the first version."""
    for name in expected.names:
        if name in actual.names and actual.field(name).type != expected.field(name).type:
            raise ValueError(f"column {name} is of type {actual.field(name).type}")
    first = {"sample_id", "object_idx", "class_id", "class_ids", "rles"} & {*expected.names}
    if missing := first.difference(actual.names):
        raise ValueError(f"no column {min(missing)}")


def _schema(pa: Any, row_type: type[R]) -> Any:
    """The Arrow schema of a row type: a nullable column per field, in their order; evidence is a column per score."""
    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

    def arrow_type(hint: Any) -> Any:
        hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        return pa.list_(arrow_type(get_args(hint)[0])) if get_origin(hint) is list else scalars[hint]

    columns: list[tuple[str, Any]] = []
    for name, hint in get_type_hints(row_type).items():
        is_evidence = Evidence in get_args(hint)
        columns += [(c, pa.float64()) for c in EVIDENCE_COLUMNS] if is_evidence else [(name, arrow_type(hint))]
    return pa.schema(columns)
