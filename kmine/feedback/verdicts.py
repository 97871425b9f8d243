"""verdicts.json: a reviewer's verdicts on masks, read and checked.

The page of the audit saves the file; `python -m kmine.audit RUN --verdicts FILE` imports it into the run, with folders
of corrected and accepted masks beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError

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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected verdicts, cannot be read ({error.strerror}); {CURE}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected verdicts as JSON, got something else ({error}); {CURE}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        actual = value.get("format") if isinstance(value, dict) else None
        raise UserError(f"{path}: expected the format {FORMAT}, got {actual!r}; {CURE}")
    rows = value.get("verdicts")
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of verdicts, got none; {CURE}")
    by_id: dict[str, Verdict] = {}
    for number, row in enumerate(rows, start=1):
        verdict = _verdict(path, number, row)
        if verdict.sample_id in by_id:
            raise UserError(f"{path}: expected one verdict a mask, got two on {verdict.sample_id}; drop one")
        by_id[verdict.sample_id] = verdict
    head = (str(value.get(name) or "") for name in ("run", "run_signature"))
    files = (_beside(path, value.get(name) or {}, name) for name in ("corrected", "accepted"))
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
    if not isinstance(row, dict) or not isinstance(row.get("sample_id"), str) or not row["sample_id"]:
        raise UserError(f"{path}: verdict {number}: expected a sample_id, got none; {CURE}")
    for name, allowed in (("kind", KINDS), ("verdict", VERDICTS)):
        if row.get(name) not in allowed:
            raise UserError(
                f"{path}: verdict {number} ({row['sample_id']}): expected {name} {', '.join(allowed)}, "
                f"got {row.get(name)!r}; {CURE}"
            )
    signature, note = (str(row.get(name) or "") for name in ("mask_signature", "note"))
    return Verdict(row["sample_id"], row["kind"], row["verdict"], signature, note)


def _beside(path: Path, entries: Any, name: str) -> dict[str, Path]:
    values = entries.values() if isinstance(entries, dict) else [None]
    if not all(isinstance(entry, dict) and "file" in entry for entry in values):
        raise UserError(f"{path}: expected {name} masks with a file each, got something else; import them again")
    files = {sample_id: path.parent / str(entry["file"]) for sample_id, entry in entries.items()}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise UserError(
            f"{path}: expected {len(files)} {name} masks beside it, {len(missing)} missing, the first: {missing[0]}; "
            "import them again with kmine.audit --verdicts FILE --corrected PATH"
        )
    return files
