"""What is done already: a line for each image in the folder of outputs, so that the same command goes on."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kmine.data.io.find_files import named
from kmine.errors import UserError
from kmine.io.files import write_atomic

LOG_FILE = ".kmine-predict.jsonl"
TABLE = "predictions.csv"
OBJECTS = "objects.csv"
Row = dict[str, Any]


class OutputLog:
    """The folder of outputs, held by one process at a time.

    A line holds the name of an image, the signature of what its outputs were made from, their sizes in bytes, and its
    row. It is written after them, so that what it lists is whole; the last line of a name counts.
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
        self._mend()

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuse outputs that would replace files which are not ours, before work starts. Raises `UserError`."""
        ours = {name for line in self._lines.values() for name in line["files"]}
        foreign = [name for name in names if name not in ours and (self.out / name).exists()]
        if foreign:
            raise UserError(
                f"{self.out}: expected no other files there, found {named(foreign)}, which kmine predict did not "
                "write; choose another --out, or move them away"
            )

    def done(self, name: str, signature: str) -> Row | None:
        """The row of an image whose outputs are there, whole and made from the same; else None."""
        line = self._lines.get(name)
        if line is None or line["signature"] != signature:
            return None
        return line["row"] if all(_size(self.out / n) == size for n, size in line["files"].items()) else None

    def add(self, name: str, signature: str, files: Iterable[str], row: Row) -> None:
        """The outputs `files` of an image are written."""
        sizes = {file: _size(self.out / file) for file in files}
        line = {"name": name, "signature": signature, "files": sizes, "row": row}
        self._lines[name] = line
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def write_table(self, header: Sequence[str], rows: Iterable[Row], name: str = TABLE) -> None:
        """predictions.csv, or another; what a row does not say is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.out / name, text.getvalue().encode())

    def close(self) -> None:
        """Let another process have the folder."""
        self._file.close()

    def _read(self) -> dict[str, Mapping[str, Any]]:
        self._file.seek(0)
        lines = filter(None, map(_line, self._file))
        return {line["name"]: line for line in lines}

    def _mend(self) -> None:
        """End a line that was cut short, so that the next one stands alone."""
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _line(text: str) -> dict[str, Any] | None:
    """What a line says; None for one that a kill cut short."""
    try:
        line = json.loads(text)
        return {name: line[name] for name in ("name", "signature", "files", "row")}
    except (ValueError, KeyError, TypeError):
        return None
