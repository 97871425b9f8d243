"""The two tables of a mining round, prompts.parquet and decisions.parquet, and their rows."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.json_file import read_regular
from kmine.ops.masks import from_rle
from kmine.store.artifacts import CURE, MAX_BYTES, DamagedError
from kmine.types import EVIDENCE_COLUMNS, Bool, Evidence, Prompts, none_to_nan

MaskName = Literal["local", "segmenter", "used"]


@dataclass(frozen=True)
class PromptRow:
    """The prompts of one object, as given to the segmenter last; fields are columns of prompts.parquet."""

    sample_id: str
    object_idx: int
    class_id: int
    box: list[float] | None
    """(4,) XYXY pixels."""
    point_coords: list[list[float]] | None
    """(P, 2) as (x, y)."""
    point_labels: list[int] | None
    has_mask_input: bool
    jittered_boxes: list[list[float]]
    """(J, 4) XYXY."""
    scaled_boxes: list[list[float]] | None = None
    """(B, 4) XYXY; None in older tables."""
    origin: str | None = None
    """`model` or `person`, as in `Prompts`; None in older tables."""

    @classmethod
    def from_prompts(cls, sample_id: str, object_idx: int, prompts: Prompts) -> PromptRow:
        """The row of an object's prompts; mask input and component are not kept."""
        arrays = (prompts.box, prompts.point_coords, prompts.point_labels)
        plain = [None if array is None else array.tolist() for array in arrays]
        boxes = (prompts.jittered_boxes.tolist(), prompts.scaled_boxes.tolist())
        own = prompts.mask_input is not None, *boxes, prompts.origin
        return cls(sample_id, object_idx, prompts.class_id, *plain, *own)

    def to_prompts(self) -> Prompts:
        """The prompts without mask input and component."""
        return Prompts(
            self.class_id,
            None if self.box is None else np.array(self.box, np.float32),
            None if self.point_coords is None else np.array(self.point_coords, np.float32),
            None if self.point_labels is None else np.array(self.point_labels, np.int64),
            jittered_boxes=np.array(self.jittered_boxes, np.float32).reshape(-1, 4),
            scaled_boxes=np.array(self.scaled_boxes or [], np.float32).reshape(-1, 4),
            origin="person" if self.origin == "person" else "model",
        )

    def to_arrow(self) -> dict[str, Any]:
        """Values by column."""
        return asdict(self)

    @classmethod
    def from_arrow(cls, values: Mapping[str, Any]) -> PromptRow:
        """From values by column; a missing column is null."""
        return cls(**{f.name: values.get(f.name) for f in fields(cls)})


@dataclass(frozen=True)
class DecisionRow:
    """The gate's decision on one object, or on an image without one; fields are columns of decisions.parquet."""

    sample_id: str
    object_idx: int
    """-1: no object was segmented in the image, and what follows `in_training` is None."""
    class_id: int
    kept: bool
    reason: str
    source: str | None = None
    """`both`, `segmenter` or `local`, as in `Decision`."""
    in_training: bool = False
    """Whether the image has a pseudo mask."""
    evidence: Evidence | None = None
    """A column per score, by the names of `EVIDENCE_COLUMNS`."""
    estimated_dice: float | None = None
    estimated_segmenter: float | None = None
    estimated_local: float | None = None
    height: int | None = None
    width: int | None = None
    local_rle: str | None = None
    """Run lengths of the local model's own mask; empty where it has no object there."""
    segmenter_rle: str | None = None
    """Run lengths of the segmenter's best mask."""

    @property
    def is_object(self) -> bool:
        """Whether the row is of an object, not of an image without one."""
        return self.object_idx >= 0

    def mask(self, of: MaskName) -> Bool:
        """(H, W) mask of the object; `used` is the one that the pseudo mask was made from.

        Raises:
            UserError: damaged or edited run lengths.
        """
        local = of == "local" or (of == "used" and self.source == "local")
        try:
            return from_rle(self.local_rle if local else self.segmenter_rle, self.height, self.width)
        except (AttributeError, TypeError, ValueError) as error:
            raise _damaged_row(self, f"a damaged mask ({error})") from error

    def to_arrow(self) -> dict[str, Any]:
        """Values by column, in the order of the table."""
        scores = astuple(self.evidence) if self.evidence else [None] * len(EVIDENCE_COLUMNS)
        columns = dict(zip(EVIDENCE_COLUMNS, scores, strict=True))
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values |= columns if name == "evidence" else {name: value}
        return values

    @classmethod
    def from_arrow(cls, values: Mapping[str, Any]) -> DecisionRow:
        """From values by column; a missing column is null, and so is the evidence if all scores are."""
        scores = [values.get(name) for name in EVIDENCE_COLUMNS]
        evidence = None if scores == [None] * len(scores) else Evidence(*none_to_nan(scores))
        return cls(**{f.name: values.get(f.name) for f in fields(cls)} | {"evidence": evidence})


R = TypeVar("R", PromptRow, DecisionRow)


def class_map(rows: Iterable[DecisionRow], shape: tuple[int, int], of: MaskName) -> NDArray[np.uint8]:
    """(H, W) class ids: the union of the objects' masks; where two overlap, the later one's class.

    Raises:
        UserError: damaged or edited run lengths, or a mask of another size.
    """
    out = np.zeros(shape, np.uint8)
    for row in rows:
        if (row.height, row.width) != shape:
            raise _damaged_row(row, f"a mask of {row.height} x {row.width} for an image of {shape[0]} x {shape[1]}")
        out[row.mask(of)] = row.class_id
    return out


def _damaged_row(row: DecisionRow, problem: str) -> UserError:
    return UserError(f"decisions.parquet: {problem} of {row.sample_id}; {CURE}")


class RowsBySample(Mapping[str, list[R]], Generic[R]):
    """The rows of each sample, in the table's order; built when read, as those of thousands would fill the memory.

    Args:
        table: an Arrow table with the rows of a sample one after the other; None for no rows.
        row_type: of the rows.
    """

    def __init__(self, table: Any, row_type: type[R]) -> None:
        self._table, self._row_type = table, row_type
        self._parts: dict[str, tuple[int, int]] = {}
        self._last: tuple[str, list[R]] | None = None
        names = [] if table is None else table["sample_id"].to_pylist()
        for name, places in groupby(range(len(names)), key=names.__getitem__):
            first, *rest = places
            self._parts[name] = (first, 1 + len(rest))

    def __getitem__(self, sample_id: str) -> list[R]:
        first, length = self._parts[sample_id]
        if self._last is None or self._last[0] != sample_id:
            values = self._table.slice(first, length).to_pylist()
            self._last = sample_id, [self._row_type.from_arrow(row) for row in values]
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def firsts(self, column: str) -> dict[str, Any]:
        """Value of a column in the first row of each sample."""
        values = [] if self._table is None else self._table[column].to_pylist()
        return {name: values[first] for name, (first, _) in self._parts.items()}


def encode_table(rows: Sequence[R], row_type: type[R], signature: str) -> bytes:
    """Parquet bytes of a table, with the signature in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa, row_type).with_metadata({"signature": signature})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row.to_arrow() for row in rows], schema), buffer, write_page_checksum=True)
    return buffer.getvalue()


def read_table(path: Path, row_type: type[R], signature: str | None) -> list[R] | None:
    """Rows of a table; None where it is missing, damaged or has another signature.

    `signature` None accepts any, and a damaged table is a `DamagedError`.
    """
    table = _read(path, row_type, signature)
    return None if table is None else [row_type.from_arrow(values) for values in table.to_pylist()]


def read_by_sample(path: Path, row_type: type[R]) -> RowsBySample[R]:
    """Rows of a table of any signature; none where it is missing. `DamagedError` if it is damaged."""
    return RowsBySample(_read(path, row_type, None), row_type)


def table_signature(path: Path) -> str:
    """The signature of a table; empty where it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return ""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return ""
    return metadata.get(b"signature", b"").decode("ascii", "replace")


def _read(path: Path, row_type: type[R], signature: str | None) -> Any:
    """The Arrow table, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not os.path.lexists(path):
        return None
    data = io.BytesIO(read_regular(path, "a table of the run", CURE, MAX_BYTES))
    try:
        # `pq.read_table` would load pandas, 55 MB
        table = pq.ParquetFile(data, page_checksum_verification=True).read(use_threads=False)
        if signature is not None and (table.schema.metadata or {}).get(b"signature") != signature.encode():
            return None
        table.validate(full=True)  # finds text that is not UTF-8, before rows are made of it
        _check_columns(table.schema, _schema(pa, row_type))
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, MemoryError) as error:
        if signature is None:
            raise DamagedError(path, str(error).split("\n")[0][:200]) from error
        return None


def _check_columns(actual: Any, expected: Any) -> None:
    """Raise `ValueError` for columns of other types, or without those of the first version."""
    for name in expected.names:
        if name in actual.names and actual.field(name).type != expected.field(name).type:
            raise ValueError(f"column {name} is of type {actual.field(name).type}")
    missing = {"sample_id", "object_idx", "class_id"}.difference(actual.names)
    if missing:
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
