"""The two tables of a mining round as Parquet: what the segmenter was asked, and what the gate decided."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from kmine.types import Evidence

Row = dict[str, Any]
ESTIMATES = ("estimated_dice", "estimated_segmenter", "estimated_local")
"""Of a decision, beside its evidence."""


class RowsBySample(Mapping[str, list[Row]]):
    """The rows of each sample, in the table's order; made when asked for: as dicts, thousands would fill the memory.

    Args:
        table: an Arrow table with the rows of a sample one after the other; None for no rows.
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        self._parts: dict[str, tuple[int, int]] = {}
        self._last: tuple[str, list[Row]] | None = None
        names = [] if table is None else table["sample_id"].to_pylist()
        for name, places in groupby(range(len(names)), key=names.__getitem__):
            first, *rest = places
            self._parts[name] = (first, 1 + len(rest))

    def __getitem__(self, sample_id: str) -> list[Row]:
        first, length = self._parts[sample_id]
        if self._last is None or self._last[0] != sample_id:
            self._last = sample_id, self._table.slice(first, length).to_pylist()
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def firsts(self, column: str) -> dict[str, Any]:
        """What the first row of each sample has in a column."""
        values = [] if self._table is None else self._table[column].to_pylist()
        return {name: values[first] for name, (first, _) in self._parts.items()}


def encode_table(rows: list[Row], name: str, signature: str) -> bytes:
    """Parquet bytes of the table `name` (prompts or decisions), signed in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa, name).with_metadata({"signature": signature})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()


def read_table(path: Path, signature: str | None) -> list[Row] | None:
    """Rows of a table; None where it is missing, damaged or made from something else (`signature` None: whatever)."""
    table = _read(path, signature)
    return None if table is None else table.to_pylist()


def read_by_sample(path: Path) -> RowsBySample:
    """Rows of a table, whoever made it; none where it is missing or damaged."""
    return RowsBySample(_read(path, None))


def _read(path: Path, signature: str | None) -> Any:
    """The Arrow table, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    data = io.BytesIO(path.read_bytes())  # read apart: an OSError below is pyarrow's word for a damaged file
    try:
        table = pq.ParquetFile(data).read(use_threads=False)  # `pq.read_table` would load pandas, 55 MB
        if signature is not None and (table.schema.metadata or {}).get(b"signature") != signature.encode():
            return None
        table.validate(full=True)  # text that is no UTF-8 shows here, not when rows are made of it
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def table_signature(path: Path) -> str:
    """The signature that a table carries; empty where it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return ""
    return metadata.get(b"signature", b"").decode("ascii", "replace")


def _schema(pa: Any, name: str) -> Any:
    """Columns of the two tables of a mining round; `object_idx` is -1 for an image in which no object was found."""
    text, number, whole, flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    keys = [("sample_id", text), ("object_idx", whole), ("class_id", whole)]
    if name == "prompts":
        numbers, rows = pa.list_(number), pa.list_(pa.list_(number))
        value_columns = [("box", numbers), ("point_coords", rows), ("point_labels", pa.list_(whole))]
        return pa.schema([*keys, *value_columns, ("has_mask_input", flag), ("jittered_boxes", rows)])
    value_columns = [(s, number) for s in [*(f.name for f in fields(Evidence)), *ESTIMATES]]
    masks = [("height", whole), ("width", whole), ("local_rle", text), ("segmenter_rle", text)]
    return pa.schema(
        [*keys, ("kept", flag), ("reason", text), ("source", text), ("in_training", flag), *value_columns, *masks]
    )
