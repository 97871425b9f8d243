"""Files from the network, whole or not at all; sole home of requests.

pooch is not used: its HTTP downloader starts over after every break and cannot tell an answer to a Range request
(206) from the whole file (200), and a file may have gigabytes. So `requests` does it here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.errors import UserError
from kmine.io.errors import storage_errors

if TYPE_CHECKING:
    import requests
    from rich.progress import Progress

CHUNK_BYTES = 1 << 16
MAX_FAILURES = 4
"""Breaks in a row, without one byte gained, after which a download gives up."""
RETRY_WAIT_S = 1.0
"""Pause after the first break; doubles with each further one."""
TIMEOUT_S = 30.0


def download(url: str, sha256: str, target: Path, *, otherwise: str) -> None:
    """Fetch a file into `target`, which appears only once its SHA-256 agreed.

    Until then it is `target` with `.part` added; a broken download leaves it, and the next call goes on from there.

    Args:
        url: where from.
        sha256: what the whole file must have (hex).
        target: the file to make; its folder is made, too.
        otherwise: what else the user can do; error messages end with it.

    Raises:
        UserError: the server failed, the content is another, the disk is full, or another process fetches the same.
    """
    part = target.with_name(target.name + ".part")
    with storage_errors(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Refuse what does not fit on the disk that holds `folder`, before any of it is written.

    Args:
        folder: an existing folder.
        needed: bytes still to be written.
        what: subject of the message, such as "the download".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {_megabytes(needed)}, and the disk has {_megabytes(free)} left; "
            "free some space, or choose a folder on another disk"
        )


def _verify(part: Path, url: str, sha256: str, otherwise: str) -> None:
    actual = sha256_of(part)
    if actual != sha256:
        # Kept, it would be continued for ever.
        part.unlink()
        raise UserError(
            f"{url}: expected SHA-256 {sha256}, got {actual}; the download was discarded: run the command again, or "
            f"{otherwise}"
        )


def _fill(part: Path, url: str, otherwise: str) -> None:
    """Fill `part` from where it ends; breaks are retried as long as bytes keep coming."""
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
    """Whether trying again makes sense: lost connections and server faults (5xx), not refusals (4xx)."""
    return error.response is None or error.response.status_code >= 500


def _continue(url: str, part: Path, progress: Progress) -> None:
    import requests

    offset = _size(part)
    # Compressed transfer would make offsets count other bytes than those on disk.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if offset and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # Nothing is left to fetch; the hash decides whether what is there is right.
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            offset = 0  # A server that does not know Range sends the whole file.
        elif _first_byte(response, offset) != offset:
            part.write_bytes(b"")  # Asked from the start, it cannot send a wrong part again.
            raise requests.ConnectionError("the server sent another part of the file than the requested one")
        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdecimal() else None
        if total is not None:
            check_space(part.parent, total - _size(part), "the download")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=total, completed=offset)
        with part.open("ab" if offset else "wb") as stream, contextlib.ExitStack() as stack:
            stack.callback(progress.remove_task, task)
            for chunk in response.iter_content(CHUNK_BYTES):
                progress.advance(task, stream.write(chunk))
    # urllib3 before 2.0 takes an early end of the connection for the end of the file.
    if total is not None and _size(part) < total and "Content-Encoding" not in response.headers:
        raise requests.ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _first_byte(response: requests.Response, expected: int) -> int:
    """Where the content of a partial answer begins; a server that does not say is trusted: the hash will tell."""
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
