"""The fields of run.json and their types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from kmine.errors import UserError
from kmine.io.json_file import is_kind, json_field

CURE = "restore it, or remove it and run the command that made the run again, which writes it anew"
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("data_fingerprint", "split_file_sha256", "verdicts_signature", "command", "dataset"), (str,)),
    **dict.fromkeys(("segmenter", "segmenter_sha256", "device", "precision"), (str,)),
    **dict.fromkeys(("git_commit", "python", "method", "arm"), (str,)),
    **dict.fromkeys(("stopped_by",), (str, NoneType)),
    **dict.fromkeys(("seconds_of_last_session", "preparation_seconds", "peak_memory_mb"), (float, NoneType)),
    **dict.fromkeys(("adopted_round", "seed", "threads", "num_skipped"), (int,)),
    **dict.fromkeys(("class_names", "skipped", "test_opened", "withheld_opened", "channels"), (list,)),
    **dict.fromkeys(("data_contents", "splits", "kept_rounds", "versions", "corrections", "trackers"), (dict,)),
    **dict.fromkeys(("check", "verdicts", "intensity"), (dict, NoneType)),
}
"""Kinds of the known fields, as in `kmine.io.json_file.NAMES`; others may join them."""
_PLAIN = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*")
_TEXTS = ("class_names", "test_opened", "withheld_opened", "channels")


def is_plain(text: object) -> bool:
    """Whether a value is one line of text without control characters."""
    return isinstance(text, str) and _PLAIN.fullmatch(text) is not None


def valid_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those of another type, which a resumed run writes anew."""
    return {name: value for name, value in info.items() if not _problem(name, value)}


def check_info(info: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` on the first field of run.json (`path`) that is of another type or out of range."""
    for name, value in info.items():
        json_field(info, name, *FIELDS.get(name, (object,)), where=str(path), cure=CURE)
        if problem := _problem(name, value):
            raise UserError(f"{path}: expected {problem} for `{name}`, got other values; {CURE}")


def _problem(name: str, value: Any) -> str:
    """What is wrong with the value of a field; empty if nothing is."""
    kinds = FIELDS.get(name, (object,))
    if not any(is_kind(value, kind) for kind in kinds):
        return "another type"
    if name in _TEXTS and not all(map(is_plain, value)):
        return "a list of texts"
    if name in ("data_contents", "versions", "corrections", "trackers") and not all(
        isinstance(text, str) for text in value.values()
    ):
        return "an object of texts"
    if name in ("splits", "kept_rounds") and not all(is_kind(count, int) for count in value.values()):
        return "an object of whole numbers"
    if name == "class_names" and not 2 <= len(value) <= 255:
        return "2 to 255 names"
    if name == "skipped" and not all(isinstance(entry, dict) for entry in value):
        return "a list of objects"
    if name == "adopted_round" and not 0 <= value < 1000:
        return "a number from 0 to 999"
    is_path = name == "arm" and any(part in ("..", "/") for part in Path(value).parts)
    is_text = isinstance(value, str) and name != "command"
    return "a plain name" if is_path or (is_text and not is_plain(value)) else ""
