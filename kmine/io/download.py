"""Downloads of files, complete or not at all; the only module that uses requests.

pooch restarts after every break and takes the answer to a Range request (206) for the whole file (200).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.errors import UserError
from kmine.io.errors import storage_errors
from kmine.io.files import lock, open_lock

if TYPE_CHECKING:
    import requests
    from rich.progress import Progress

CHUNK_BYTES = 1 << 16
MAX_FAILURES = 4
"""Limit for consecutive breaks without a received byte."""
RETRY_WAIT_S = 1.0
"""Pause after the first break; doubled after each further one."""
TIMEOUT_S = 30.0


def download(url: str, sha256: str, target: Path, *, otherwise: str) -> None:
    """Download a file to `target`, which appears once its SHA-256 (hex) is verified.

    A broken download leaves `target` with `.part` added, which the next call continues. `otherwise` ends the error
    messages: what else the user can do.

    Raises:
        UserError: for a failing server, other content, a full disk, or another process that downloads the same file.
    """
    part = target.with_name(target.name + ".part")
    with storage_errors(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_lock(part) as file:
            try:
                lock(file, wait=False)
            except BlockingIOError as error:
                raise UserError(f"{part}: another process is downloading it; wait until it is done") from error
            try:
                _fill(part, url, otherwise)
                _verify(part, url, sha256, otherwise)
            finally:
                if part.exists() and not _size(part):
                    part.unlink()
            part.replace(target)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if `needed` bytes do not fit on the disk of the existing `folder`; `what` opens the message."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {_megabytes(needed)}, and the disk has {_megabytes(free)} left; "
            "free some space, or choose a folder on another disk"
        )


def _verify(part: Path, url: str, sha256: str, otherwise: str) -> None:
    actual = sha256_of(part)
    if actual != sha256:
        part.unlink()  # else every further call would continue it
        raise UserError(
            f"{url}: expected SHA-256 {sha256}, got {actual}; the download was discarded: run the command again, or "
            f"{otherwise}"
        )


def _fill(part: Path, url: str, otherwise: str) -> None:
    """Continue `part` at its end; breaks are retried as long as bytes are received."""
    import requests

    failures = 0
    with _progress() as progress:
        while True:
            before = _size(part)
            try:
                return _continue(url, part, progress)
            except requests.RequestException as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= MAX_FAILURES or not _is_transient(error):
                    raise UserError(
                        f"{url}: the download failed ({error}); {_size(part)} bytes are kept, run the command again "
                        f"to go on, or {otherwise}"
                    ) from error
                time.sleep(RETRY_WAIT_S * 2 ** (failures - 1))


def _is_transient(error: requests.RequestException) -> bool:
    """Whether to retry: after lost connections and server errors (5xx), not after client errors (4xx)."""
    return error.response is None or error.response.status_code >= 500


def _continue(url: str, part: Path, progress: Progress) -> None:
    import requests

    offset = _size(part)
    # With compressed transfer, offsets would not count the bytes on disk.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if offset and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # complete; the checksum is compared next
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            offset = 0  # a server without support of Range sends the whole file
        elif _first_byte(response, offset) != offset:
            part.write_bytes(b"")  # start over without Range
            raise requests.ConnectionError("the server sent another part of the file than requested")
        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdecimal() else None
        if total is not None:
            check_space(part.parent, total - _size(part), "the download")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=total, completed=offset)
        with part.open("ab" if offset else "wb") as stream, contextlib.ExitStack() as stack:
            stack.callback(progress.remove_task, task)
            for chunk in response.iter_content(CHUNK_BYTES):
                progress.advance(task, stream.write(chunk))
    # urllib3 before 2.0 reports no error for a connection that ends early.
    if total is not None and _size(part) < total and "Content-Encoding" not in response.headers:
        raise requests.ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _first_byte(response: requests.Response, expected: int) -> int:
    """Offset of a partial answer; `expected` if the server sends none, as the checksum is compared in the end."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else expected


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
