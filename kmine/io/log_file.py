"""A log file with clock times, for a command's progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kmine.io.console import duration, visible
from kmine.types import ProgressReporter

LOG_FILE = "log.txt"
"""Its name in a run folder."""


class LogFile:
    """A `ProgressReporter` that appends lines with clock times to a file, and passes all on to `shown`, if given."""

    def __init__(self, path: Path, shown: ProgressReporter | None = None, first: str = "") -> None:
        self.path, self._shown, self._work, self._total = path, shown, "", 0
        self.began = self._since = time.perf_counter()
        self.first = first
        """A line that is written before any other."""

    def start(self, title: str, total: int) -> None:
        """Begin a piece of work; the title is written."""
        self._work, self._total, self._since = title, total, time.perf_counter()
        self._write(f"{title} ({total})")
        if self._shown:
            self._shown.start(title, total)

    def advance(self, done: int, text: str = "") -> None:
        """Report finished steps; the time is written when all are."""
        if done >= self._total > 0:
            self._write(f"{self._work}: {text or done} in {duration(time.perf_counter() - self._since)}")
            self._total = 0
        if self._shown:
            self._shown.advance(done, text)

    def log(self, text: str) -> None:
        """Write a line."""
        self._write(text)
        if self._shown:
            self._shown.log(text)

    def _write(self, text: str) -> None:
        if first := self.first:
            self.first = ""
            self._write(first)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {visible(text)}\n")


@contextmanager
def logged(path: Path, shown: ProgressReporter) -> Iterator[ProgressReporter]:
    """`shown` with a log file beside it, which also says by which error the block ended.

    A block that is refused before it reports anything leaves the file as it was.
    """
    progress = LogFile(path, shown, "begins")
    try:
        yield progress
    except BaseException as error:
        if not progress.first:
            with suppress(OSError):  # the disk is full
                progress._write(f"ended by {type(error).__name__}: {error}")
        raise
    progress._write(f"done in {duration(time.perf_counter() - progress.began)}")
