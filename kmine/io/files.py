"""Files of a run folder: written whole or not at all, signed, under names that any file system takes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError

UNFINISHED = ".kmine-tmp"
"""How the name of a file being written ends."""
MAX_NAME = 200
"""Bytes of a file name before its ending; file systems end at 255, and a file being written needs some more."""


def sign(*parts: object) -> str:
    """A short signature (16 hex digits) of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear error; nothing already written is touched."""
    try:
        yield
    except OSError as error:
        cures = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, it resumes",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it resumes",
            errno.EACCES: "no permission to write there; choose another --out",
            errno.EPERM: "no permission to write there; choose another --out",
            errno.EROFS: "the file system is read-only; choose another --out",
            errno.ENOTDIR: "a file stands where a folder is needed; choose another --out",
            errno.EEXIST: "a file stands where a folder is needed; choose another --out",
            errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter --out",
        }
        if error.errno not in cures:
            raise
        raise UserError(f"{path}: {cures[error.errno]}") from error


@contextmanager
def atomic_open(path: Path, mode: Literal["w", "wb"] = "wb") -> Iterator[IO[Any]]:
    """A file to write to that becomes `path` when all went well: a reader sees the old one or the whole new one.

    Text ("w") is UTF-8, its line ends left as they are.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temp.open(mode, **({} if mode == "wb" else {"encoding": "utf-8", "newline": ""})) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, whatever happens meanwhile."""
    with atomic_open(path) as file:
        file.write(data)


def safe_name(sample_id: str) -> str:
    """A file name, without ending, for any sample id: percent-encoded; an overlong one ends in a hash of the whole."""
    name = quote(sample_id, safe=" ()+,=@")
    if len(name) > MAX_NAME:
        return f"{name[: MAX_NAME - 17]}~{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"
    return name


def encode_png(mask: NDArray[np.uint8], signature: str, round_idx: int) -> bytes:
    """A pseudo mask as PNG bytes, its signature and round in text chunks."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("kmine.signature", signature)
    info.add_text("kmine.round", str(round_idx))
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def is_whole_png(path: Path, signature: str) -> bool:
    """Whether a pseudo mask is there, undamaged and made from what the signature says."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            signed = image.info.get("kmine.signature") == signature
            image.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow's words for missing, truncated and damaged
        return False
    return signed


def nan_to_none(value: Any) -> Any:
    """The same nested value with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {k: nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all; NaN becomes null."""
    write_atomic(path, json.dumps(nan_to_none(value), indent=1, allow_nan=False).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, whoever wrote it; None where it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # bytes that are no text, text that is no JSON
        return None
    return value if isinstance(value, dict) else None
