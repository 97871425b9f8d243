"""Tensors and JSON of a run folder: each file carries a checksum of its own, compared whenever it is read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine.errors import UserError
from kmine.io.files import nan_to_none, sign
from kmine.io.json_file import parse_json, read_regular
from kmine.io.tensor_file import encode_safetensors

if TYPE_CHECKING:
    from torch import Tensor

CURE = "remove it and run the command that made the run again, which makes it anew"
MAX_BYTES, MAX_HEADER = 2**33, 2**27
_KEY, _BLANK = b'"sha256":"', b"0" * 64
COLUMNS = {"splits.csv": {"sample_id", "group_id", "split"}, "contents.csv": {"sample_id", "image_crc32", "mask_crc32"}}
"""Required columns of tables."""
CHECK = "check"
"""Key of a JSON file's signature of all its other values."""


class DamagedError(UserError):
    """A file of the run folder that is not what kmine wrote."""

    def __init__(self, path: Path, problem: str = "its content is not what kmine wrote") -> None:
        super().__init__(f"{path}: damaged or edited ({problem}); {CURE}")


def encode_tensors(tensors: Mapping[str, Tensor], signature: str, meta: Mapping[str, Any]) -> bytes:
    """Safetensors with signature, JSON-able metadata, and the SHA-256 of the file with 64 zeros in its place.

    Equal arguments give equal bytes.
    """
    metadata = {"signature": signature, "meta": json.dumps(meta), "sha256": _BLANK.decode()}
    data = encode_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    start = data.index(_KEY + _BLANK) + len(_KEY)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + len(_BLANK) :]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file; None if there is none. Files without a checksum, of older versions, are read.

    Raises:
        DamagedError: the content is not what was written.
        UserError: a folder or pipe in its place, more than `MAX_BYTES`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not os.path.lexists(path):
        return None
    data = read_regular(path, "the weights of a run", CURE, MAX_BYTES)
    start = data.find(_KEY, 0, 8 + int.from_bytes(data[:8], "little")) + len(_KEY)
    if start >= len(_KEY):
        digest = hashlib.sha256(data[:start])
        digest.update(_BLANK)
        digest.update(memoryview(data)[start + len(_BLANK) :])
        if digest.hexdigest().encode() != data[start : start + len(_BLANK)]:
            raise DamagedError(path)
    try:
        return load(data), tensor_metadata(path)
    except (SafetensorError, KeyError, TypeError) as error:
        raise DamagedError(path, str(error).split("\n")[0][:200]) from error


def tensor_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, from its header alone; empty where it is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= MAX_HEADER else {}
        metadata = header.get("__metadata__")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn the error of `load_state_dict` within the block, on weights from `path`, into a `DamagedError`."""
    try:
        yield
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise DamagedError(path, f"not of this run's model: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def record_errors(path: Path) -> Iterator[None]:
    """Turn errors of taking values from the JSON file `path` within the block into a `DamagedError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(path, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from error


def checked(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able values with their signature under `CHECK`; NaN becomes None."""
    plain = json.loads(json.dumps(nan_to_none(value)))
    return plain | {CHECK: sign(plain)}


def read_checked(path: Path) -> dict[str, Any] | None:
    """Values that `checked` made, from their file; None if there is none. Without `CHECK`, of older versions, as is.

    Raises:
        DamagedError: no JSON object, or not what was written.
        UserError: a folder or pipe in its place.
    """
    if not os.path.lexists(path):
        return None
    data = read_regular(path, "a file of the run", CURE)
    try:
        value = parse_json(data, str(path), "a file of the run", CURE)
    except UserError as error:
        raise DamagedError(path, "no JSON") from error
    if not isinstance(value, dict):
        raise DamagedError(path, "expected an object")
    if isinstance(value.get(CHECK), str) and value.pop(CHECK) != sign(value):
        raise DamagedError(path)
    return value


def read_rows(path: Path) -> list[dict[str, str]] | None:
    """Rows of a CSV file with a header; None if there is none. `DamagedError` if it is no whole table."""
    if not os.path.lexists(path):
        return None
    data = read_regular(path, "a table of the run", CURE)
    try:
        text = data.decode("utf-8-sig")
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError) as error:
        raise DamagedError(path, str(error)) from error
    wrong = [row for row in rows if len(row) != len(header)]
    has_columns = len(set(header)) == len(header) and set(header) >= COLUMNS.get(path.name, set())
    if wrong or not has_columns:
        raise DamagedError(path, f"{len(wrong)} rows of another length" if wrong else "another header")
    return [dict(zip(header, row, strict=True)) for row in rows]


def seconds_of(path: Path) -> float:
    """Duration of a training from the metadata of its weights; 0 where unknown."""
    try:
        return float(json.loads(tensor_metadata(path).get("meta", "{}")).get("seconds", 0.0))
    except (AttributeError, TypeError, ValueError):
        return 0.0
