"""The two tables of a mining round as Parquet: what the segmenter was asked, and what the gate decided."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path
from typing import Any

from kmine.records import Evidence

Row = dict[str, Any]
ESTIMATES = ("estimated_dice", "estimated_segmenter", "estimated_local")
"""Of a decision, beside its evidence."""


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    data = io.BytesIO(path.read_bytes())  # read apart: an OSError below is pyarrow's word for a damaged file
    try:
        table = pq.read_table(data)
        if signature is not None and (table.schema.metadata or {}).get(b"signature") != signature.encode():
            return None
        return table.to_pylist()
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
        more = [("box", numbers), ("point_coords", rows), ("point_labels", pa.list_(whole))]
        return pa.schema([*keys, *more, ("has_mask_input", flag), ("jittered_boxes", rows)])
    more = [(s, number) for s in [*(f.name for f in fields(Evidence)), *ESTIMATES]]
    masks = [("height", whole), ("width", whole), ("local_rle", text), ("segmenter_rle", text)]
    return pa.schema([*keys, ("kept", flag), ("reason", text), ("source", text), ("in_training", flag), *more, *masks])
