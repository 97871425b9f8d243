"""Log of finished outputs in the folder of outputs, one line per image, from which the same command resumes."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kmine.errors import UserError, first_names
from kmine.io.files import write_atomic

LOG_FILE = ".kmine-predict.jsonl"
TABLE = "predictions.csv"
OBJECTS = "objects.csv"
Row = dict[str, Any]


class OutputLog:
    """The folder of outputs, locked by one process at a time.

    A line has the name of an image, the signature of its outputs, their sizes in bytes, and its row. It is written
    after the outputs, so they are complete; the last line of a name counts.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._file = (out / LOG_FILE).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot be written to ({error.strerror}); choose another --out") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another process is predicting into this folder; choose another --out") from error
        self._lines = self._read()
        self._end_last_line()

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raise `UserError` if outputs would replace files that kmine predict did not write."""
        ours = {name for line in self._lines.values() for name in line["files"]}
        foreign = [name for name in names if name not in ours and (self.out / name).exists()]
        if foreign:
            raise UserError(
                f"{self.out}: expected no other files there, found {first_names(foreign)}, which kmine predict did not "
                "write; choose another --out, or move them away"
            )

    def done(self, name: str, signature: str) -> Row | None:
        """The row of an image if its outputs are complete and have this signature, else None."""
        line = self._lines.get(name)
        if line is None or line["signature"] != signature:
            return None
        return line["row"] if all(_size(self.out / n) == size for n, size in line["files"].items()) else None

    def add(self, name: str, signature: str, files: Iterable[str], row: Row) -> None:
        """Record the written outputs `files` of an image."""
        sizes = {file: _size(self.out / file) for file in files}
        line = {"name": name, "signature": signature, "files": sizes, "row": row}
        self._lines[name] = line
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def write_table(self, header: Sequence[str], rows: Iterable[Row], name: str = TABLE) -> None:
        """Write a table; columns that a row lacks are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.out / name, text.getvalue().encode())

    def close(self) -> None:
        """Release the folder."""
        self._file.close()

    def _read(self) -> dict[str, Mapping[str, Any]]:
        self._file.seek(0)
        lines = filter(None, map(_line, self._file))
        return {line["name"]: line for line in lines}

    def _end_last_line(self) -> None:
        """Terminate a line that a kill cut short, so that the next one starts on its own line."""
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _line(text: str) -> dict[str, Any] | None:
    """Parse a line; None for one that a kill cut short."""
    try:
        line = json.loads(text)
        return {name: line[name] for name in ("name", "signature", "files", "row")}
    except (ValueError, KeyError, TypeError):
        return None
