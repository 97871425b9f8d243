"""Log of finished outputs in the folder of outputs, one line per image, from which the same command resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kmine.errors import UserError, first_names
from kmine.io.errors import user_errors
from kmine.io.files import UNFINISHED, lock, refuse_links, sign, write_csv

LOG_FILE = ".kmine-predict.jsonl"
TABLE = "predictions.csv"
OBJECTS = "objects.csv"
FOLDERS = ("masks", "probs", "overlays", "segs")
Row = dict[str, Any]


class OutputLog:
    """The folder of outputs, locked by one process at a time.

    A line names either files that are about to be written (`claimed`), or an image with the signature of its outputs,
    their sizes in bytes, and its row; the latter is written after the outputs, so they are complete. The last line of
    an image counts. Each line carries its own signature (`check`): of a damaged one only the file names count.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            refuse_links(out / name for name in (LOG_FILE, *FOLDERS))
            self._file = (out / LOG_FILE).open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{out}: cannot be written to ({error.strerror}); choose another --out") from error
        try:
            lock(self._file, wait=False)
        except OSError as error:
            raise UserError(f"{out}: another process is predicting into this folder; choose another --out") from error
        self._lines: dict[str, Mapping[str, Any]] = {}
        self._ours: set[str] = set()
        self._read()
        for path in (path for name in FOLDERS for path in (out / name).rglob(f".*{UNFINISHED}")):
            path.unlink(missing_ok=True)  # left by a killed process

    def claim(self, names: Iterable[str]) -> None:
        """Record that the files `names` (relative paths) are about to be written by kmine predict.

        Raises:
            UserError: some of them exist and were written by something else.
        """
        new = [name for name in names if name not in self._ours]
        foreign = [name for name in new if os.path.lexists(self.out / name)]
        if foreign:
            raise UserError(
                f"{self.out}: expected no other files there, found {first_names(foreign)}, which kmine predict did not "
                "write; choose another --out, or move them away"
            )
        if new:
            self._append({"claimed": new})
            os.fsync(self._file.fileno())
            self._ours.update(new)

    def done(self, name: str, signature: str) -> Row | None:
        """The row of an image if its outputs are complete and have this signature, else None."""
        line = self._lines.get(name)
        if line is None or line["signature"] != signature:
            return None
        return line["row"] if all(_size(self.out / n) == size for n, size in line["files"].items()) else None

    def add(self, name: str, signature: str, files: Iterable[str], row: Row) -> None:
        """Record the written outputs `files` of an image."""
        sizes = {file: _size(self.out / file) for file in files}
        self._lines[name] = line = {"name": name, "signature": signature, "files": sizes, "row": row}
        self._append(line)

    def write_table(self, header: Sequence[str], rows: Iterable[Row], name: str = TABLE) -> None:
        """Write a table; columns that a row lacks are empty."""
        write_csv(self.out / name, header, ([row.get(column, "") for column in header] for row in rows))

    def close(self) -> None:
        """Release the folder."""
        with suppress(OSError):  # a line that could not be written, which `_append` has named
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        with user_errors(self.out / LOG_FILE):
            self._file.write(json.dumps({**line, "check": sign(line)}) + "\n")
            self._file.flush()

    def _read(self) -> None:
        """Read all lines; one that a kill cut short is terminated, so that the next one starts on its own line."""
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")
        for line in map(_parsed, text.split("\n")):
            self._ours.update(name for key in ("claimed", "files") for name in _names(line.get(key)))
            if line.pop("check", None) == sign(line) and "name" in line:
                self._lines[line["name"]] = line


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _parsed(text: str) -> dict[str, Any]:
    """A line of the log; empty for one that a kill cut short or that is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _names(value: Any) -> list[str]:
    """The file names of a list, or of a mapping from names to sizes."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list | dict) else []
