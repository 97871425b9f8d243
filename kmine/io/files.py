"""Files of a run folder: atomic writes, signatures, names that any file system takes; folder of all caches."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.errors import expanded, user_errors
from kmine.io.json_file import parse_json, read_regular
from kmine.types import IGNORE_INDEX

CLASS_COLOURS = ((0, 229, 255), (166, 255, 60), (148, 122, 255), (255, 240, 70), (255, 90, 255), (0, 190, 140))
"""RGB of class 1, 2, ..., in hues that tissue lacks; darker in each repetition."""
UNFINISHED = ".kmine-tmp"
"""Suffix of a file that is being written."""
MAX_NAME = 200
"""Bytes of a file name before its suffix; file systems allow 255, and a temporary file needs a longer suffix."""

SIGNATURE_KEY = "kmine.signature"
"""PNG text chunk of kmine's own masks, whose values are class ids and 255 for ignored pixels."""
MAX_PIXELS = 2**26
"""Limit for a mask, 8192 x 8192."""


def sign(*parts: object) -> str:
    """Signature of JSON-serializable values: the first 16 hex digits of their SHA-256."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def atomic_open(path: Path, mode: Literal["w", "wb"] = "wb", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` on success: a reader sees the old file or the whole new one.

    Text (mode "w") is UTF-8 with unchanged line ends. Without `sync` a power failure may damage the file.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temp.open(mode, **({} if mode == "wb" else {"encoding": "utf-8", "newline": ""})) as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `data` to `path`: a reader sees the old file or the whole new one, also after a crash.

    Without `sync` a power failure may damage the file.
    """
    with atomic_open(path, sync=sync) as file:
        file.write(data)


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a table to `path` as `write_atomic` does: UTF-8, lines end in a newline.

    Bytes of names that are not UTF-8 become `?`.
    """
    with atomic_open(path, "w") as file:
        # csv quotes a carriage return only where it is part of the line end.
        lines = SimpleNamespace(
            write=lambda line: file.write(line.removesuffix("\r\n").encode(errors="replace").decode() + "\n")
        )
        csv.writer(lines, lineterminator="\r\n").writerows([header, *rows])


def refuse_links(paths: Iterable[Path]) -> None:
    """Raise `UserError` if one of `paths`, or anything below it, is no plain file or folder.

    Writes through a symbolic link would leave the folder, and opening a pipe waits for its other end.
    """
    for path in paths:
        if path.is_symlink():
            raise UserError(
                f"{path}: expected a file or folder of kmine's own, got a symbolic link to {path.readlink()}; replace "
                "it by what it names, or choose another folder"
            )
        if path.is_dir():
            refuse_links(path.iterdir())
        elif path.exists() and not path.is_file():
            raise UserError(
                f"{path}: expected a file or folder of kmine's own, got a pipe, socket or device; remove it, or choose "
                "another folder"
            )


def open_lock(path: Path) -> IO[bytes]:
    """Open a file to lock it, empty if new. Raises `OSError`, and `UserError` for a link, a pipe or a device."""
    refuse_links([path])
    # Windows has neither of the last two.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def lock(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file against other processes, and threads that opened it themselves, until it is closed.

    Raises:
        BlockingIOError: it is locked, and `wait` is false.
        OSError: the file system has no locks.
    """
    import portalocker

    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | (0 if wait else portalocker.LockFlags.NON_BLOCKING))
    except portalocker.AlreadyLocked as error:
        raise BlockingIOError(errno.EAGAIN, "locked by another process") from error
    except portalocker.LockException as error:
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error))) from error


def safe_name(sample_id: str) -> str:
    """File name, without suffix, of any sample id: percent-encoded; a name over `MAX_NAME` bytes ends in a hash."""
    name = quote(sample_id, safe=" ()+,=@")
    if len(name) > MAX_NAME:
        return f"{name[: MAX_NAME - 17]}~{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"
    return name


def class_colours(num_classes: int) -> NDArray[np.uint8]:
    """(K, 3) RGB, one colour per class id; the background is black, and of 256 the last, `IGNORE_INDEX`, is grey."""
    numbers = np.arange(IGNORE_INDEX - 1)
    shades = np.array(CLASS_COLOURS)[numbers % len(CLASS_COLOURS)] / (1 + numbers[:, None] // len(CLASS_COLOURS) / 3)
    return np.vstack([np.zeros(3), shades, np.full(3, 128)]).astype(np.uint8)[:num_classes]


def encode_png(mask: NDArray[np.uint8], signature: str = "", round_idx: int = 0, *, palette: bool = False) -> bytes:
    """Encode a mask, (H, W) uint8 class ids, as PNG; signature and round are stored in text chunks.

    With a `palette` any viewer shows the classes in their colours; a pixel's index is its class id.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text(SIGNATURE_KEY, signature)
    info.add_text("kmine.round", str(round_idx))
    buffer, picture = io.BytesIO(), Image.fromarray(mask)
    if palette:
        picture.putpalette(class_colours(256).tobytes())
    picture.save(buffer, "PNG", pnginfo=info, compress_type=zlib.Z_RLE)  # of long runs: half the time
    return buffer.getvalue()


def read_png(path: Path, cure: str = "import it again with kmine audit") -> NDArray[np.uint8]:
    """(H, W) class ids of a mask that `encode_png` wrote. Raises `UserError` for other, damaged or too large files."""
    from PIL import Image

    data = read_regular(path, "a mask of kmine (PNG)", cure)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            is_ours = image.mode == "L" or (image.mode == "P" and SIGNATURE_KEY in image.info)
            if is_ours and image.width * image.height <= MAX_PIXELS:
                return np.asarray(image, np.uint8).copy()
            actual = f"got mode {image.mode}, {image.width} x {image.height}"
    except Exception as error:  # decoders raise any type on foreign bytes
        actual = f"cannot be read ({re.sub(r'<.*>', 'as PNG', str(error) or type(error).__name__)})"
    raise UserError(f"{path}: expected a mask of kmine (8-bit grey PNG), {actual}; {cure}")


def nan_to_none(value: Any) -> Any:
    """Copy of a nested value with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {k: nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN becomes null."""
    write_atomic(path, json.dumps(nan_to_none(value), indent=1, allow_nan=False).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file that holds an object; None where it is missing, damaged or of another type.

    Raises:
        UserError: a folder, pipe or device in its place, a file that may not be read or is too large.
    """
    if not os.path.lexists(path):
        return None
    data = read_regular(path, "a JSON file", "move it away")
    try:
        value = parse_json(data, str(path), "a JSON file", "")
    except UserError:
        return None
    return value if isinstance(value, dict) else None


def cache_root(folder: Path | str | None = None) -> Path:
    """Folder of all caches: `folder`, else $KMINE_CACHE, else ~/.cache/kmine."""
    return expanded(folder or os.environ.get("KMINE_CACHE") or "~/.cache/kmine")


def default_cache_dir() -> Path:
    """Folder for weights: `weights` in $KMINE_CACHE, else in ~/.cache/kmine."""
    return cache_root() / "weights"
