"""JSON that a user may have touched: regular files of bounded size and depth, one error that names file and field."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from types import NoneType
from typing import Any

from kmine.errors import UserError

MAX_BYTES, MAX_DEPTH = 2**28, 64
"""Limits of a file and of its nesting; kmine's own files stay far below."""
NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    NoneType: "null or NaN",
}


def read_regular(path: Path, expected: str, cure: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Content of a regular file; `expected` and `cure` are parts of the message.

    Raises:
        UserError: a missing or unreadable file, a folder, pipe, socket or device, more than `max_bytes`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # never waits on a pipe; Windows has no such flag
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                actual = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
                raise UserError(f"{path}: expected {expected}, got {actual}; {cure}")
            data = file.read(min(status.st_size, max_bytes) + 1)
    except IsADirectoryError as error:
        raise UserError(f"{path}: expected {expected}, got a folder; {cure}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: expected {expected}, cannot be read ({reason}); {cure}") from error
    if len(data) > max_bytes:
        raise UserError(f"{path}: expected {expected} of at most {max_bytes:,} bytes, got more; {cure}")
    return data


def parse_json(data: bytes | str, where: str, expected: str, cure: str) -> Any:
    """Value of a JSON text; NaN, infinities and whole numbers beyond 64 bits become None. `where` opens the message.

    Raises:
        UserError: no JSON (UTF-8, -16 or -32), unpaired surrogates, nesting deeper than `MAX_DEPTH`.
    """
    try:
        text = data.decode(json.detect_encoding(data)) if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_short)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where}: expected {expected}, got JSON nested too deeply; {cure}") from error
    except ValueError as error:
        raise UserError(f"{where}: expected {expected} as JSON, got something else ({error}); {cure}") from error
    level, depth = [value], 0
    while level := [v for node in level for v in _children(node) if isinstance(v, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: expected {expected}, got JSON nested too deeply; {cure}")
    return value


def load_json(path: Path, expected: str, cure: str, max_bytes: int = MAX_BYTES) -> Any:
    """Value of a JSON file. Raises `UserError` as `read_regular` and `parse_json` do."""
    return parse_json(read_regular(path, expected, cure, max_bytes), str(path), expected, cure)


def json_field(value: Any, name: str, *kinds: type, where: str, cure: str) -> Any:
    """`value[name]`, None if absent; `kinds` as in `NAMES` (float takes whole numbers too, bool is no number).

    Raises:
        UserError: `value` is no object, or the field is of no such kind.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with `{name}`, got {kind_of(value)}; {cure}")
    found = value.get(name)
    if not any(is_kind(found, kind) for kind in kinds):
        expected = " or ".join(NAMES[kind] for kind in kinds)
        raise UserError(f"{where}: expected `{name}` to be {expected}, got {kind_of(found)}; {cure}")
    return found


def is_kind(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind of `NAMES`."""
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def kind_of(value: Any) -> str:
    """Short text of a JSON value for a message: numbers and short texts themselves, else the kind."""
    is_short = isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 60)
    return json.dumps(value) if is_short else next(NAMES[kind] for kind in (*NAMES,) if isinstance(value, kind))


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _short(text: str) -> int | None:
    value = int(text) if len(text) <= 20 else None
    return value if value is not None and -(2**63) <= value < 2**64 else None
