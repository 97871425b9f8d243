"""verdicts.json: a reviewer's verdicts on masks, read and checked.

The page of the audit saves the file; `python -m kmine.audit RUN --verdicts FILE` imports it into the run, with folders
of corrected and accepted masks beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.files import read_png
from kmine.io.json_file import json_field, kind_of, load_json

FORMAT = "kmine-verdicts-1"
KINDS = ("pseudo", "labeled")
VERDICTS = ("accept", "reject", "unsure")
FILE, FOLDER, ACCEPTED = "verdicts.json", "corrected", "accepted"
"""File and folder names in a run folder."""
CURE = "save it again from audit.html"


@dataclass(frozen=True)
class Verdict:
    """A reviewer's verdict on one mask."""

    sample_id: str
    kind: str
    verdict: str
    mask_signature: str = ""
    """Signature of the reviewed mask; empty if unknown."""
    note: str = ""
    mended: tuple[tuple[int, str], ...] = ()
    """The mask as the reviewer changed it on the page, in place of the reviewed one: class id (255: ignored) and COCO's
    run lengths; later ones on top."""


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on the masks of one run, with corrected and accepted masks."""

    run: str
    run_signature: str
    all: tuple[Verdict, ...]
    """At most one verdict per sample; a sample is of one kind in a run."""
    corrected: Mapping[str, Path] = field(default_factory=dict)
    """Masks drawn by a reviewer, by sample id: PNG of (H, W) class ids, 255 ignored."""
    masks: Mapping[str, Path] = field(default_factory=dict)
    """Accepted pseudo masks as reviewed, by sample id: PNG likewise. Empty in a file saved by the page."""

    @property
    def accepted(self) -> frozenset[str]:
        """Samples with an accepted mask."""
        return self._with_verdict("accept")

    @property
    def rejected(self) -> frozenset[str]:
        """Samples with a rejected mask, whether or not there is a corrected one."""
        return self._with_verdict("reject")

    @property
    def unsure(self) -> frozenset[str]:
        """Samples with the verdict `unsure`."""
        return self._with_verdict("unsure")

    def _with_verdict(self, value: str) -> frozenset[str]:
        return frozenset(verdict.sample_id for verdict in self.all if verdict.verdict == value)


def mask_signature(mask: NDArray[np.uint8]) -> str:
    """16 hex digits of the SHA-256 of a mask's shape and class ids, independent of file and memory layout."""
    sha256 = hashlib.sha256(f"{mask.shape}".encode())
    sha256.update(np.ascontiguousarray(mask, np.uint8))
    return sha256.hexdigest()[:16]


def read_verdicts(path: Path) -> Verdicts:
    """Read a verdicts.json saved by the page, or that of a run folder with its masks.

    Raises:
        UserError: a missing file, no JSON, another format, an unknown verdict or kind, two verdicts on one mask, or a
            missing mask file.
    """
    value = load_json(path, "verdicts", CURE)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        actual = kind_of(value.get("format") if isinstance(value, dict) else value)
        raise UserError(f"{path}: expected the format {FORMAT}, got {actual}; {CURE}")
    rows = json_field(value, "verdicts", list, where=str(path), cure=CURE)
    by_id: dict[str, Verdict] = {}
    for number, row in enumerate(rows, start=1):
        verdict = _verdict(path, number, row)
        if verdict.sample_id in by_id:
            raise UserError(f"{path}: expected one verdict a mask, got two on {verdict.sample_id}; drop one")
        by_id[verdict.sample_id] = verdict
    head = (_text(value, name, str(path)) for name in ("run", "run_signature"))
    files = (_beside(path, value, name) for name in ("corrected", "accepted"))
    return Verdicts(*head, tuple(by_id.values()), *files)


def to_json(
    verdicts: Verdicts, corrected: Mapping[str, Mapping[str, str]], accepted: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Content of a run's verdicts.json; the masks' entries hold `file` (relative) and `mask_signature`."""
    return {
        "format": FORMAT,
        "run": verdicts.run,
        "run_signature": verdicts.run_signature,
        "verdicts": [vars(verdict) for verdict in verdicts.all],
        "corrected": {name: dict(entry) for name, entry in corrected.items()},
        "accepted": {name: dict(entry) for name, entry in accepted.items()},
    }


def _verdict(path: Path, number: int, row: Any) -> Verdict:
    if not _text(row, "sample_id", where := f"{path}: verdict {number}"):
        raise UserError(f"{where}: expected a sample_id, got none; {CURE}")
    for name, allowed in (("kind", KINDS), ("verdict", VERDICTS)):
        if row.get(name) not in allowed:
            raise UserError(
                f"{where} ({row['sample_id'][:200]}): expected {name} {', '.join(allowed)}, "
                f"got {kind_of(row.get(name))}; {CURE}"
            )
    signature, note = (_text(row, name, where) for name in ("mask_signature", "note"))
    mended = json_field(row, "mended", list, NoneType, where=where, cure=CURE) or []
    for part in mended:
        if not (isinstance(part, list) and [*map(type, part)] == [int, str]):
            raise UserError(f"{where}: expected mended masks as [class id, run lengths], got {kind_of(part)}; {CURE}")
    return Verdict(row["sample_id"], row["kind"], row["verdict"], signature, note, tuple(map(tuple, mended)))


def _text(row: Any, name: str, where: str) -> str:
    return json_field(row, name, str, NoneType, where=where, cure=CURE) or ""


def _beside(path: Path, value: Any, name: str) -> dict[str, Path]:
    """Files of masks by sample id, each in the folder of verdicts.json and as it was when imported."""
    cure = f"restore it, or remove {path} and import verdicts and masks again"
    entries = json_field(value, name, dict, NoneType, where=str(path), cure=cure) or {}
    files: dict[str, Path] = {}
    for sample_id, entry in entries.items():
        relative = json_field(entry, "file", str, where=f"{path}: {name}", cure=cure)
        files[sample_id] = path.parent / relative
        if Path(relative).is_absolute() or ".." in Path(relative).parts or "\0" in relative:
            raise UserError(f"{path}: expected {name} masks in its own folder, got {relative[:200]!r}; {cure}")
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise UserError(
            f"{path}: expected {len(files)} {name} masks beside it, {len(missing)} missing, the first: {missing[0]}; "
            f"{cure}"
        )
    for sample_id, file in files.items():
        signature = _text(entries[sample_id], "mask_signature", f"{path}: {name}")
        if signature and signature != mask_signature(read_png(file)):
            raise UserError(f"{file}: expected the mask as it was imported, got another; {cure}")
    return files
