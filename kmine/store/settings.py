"""Settings of runs: which may differ when a run is resumed, and those that are younger than a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from kmine import cli
from kmine.config import LoopConfig, ModelConfig
from kmine.io.errors import expanded
from kmine.io.older_settings import BEFORE, REMOVED

SOURCES = (
    *("cache_dir", "root", "images", "masks", "mask_suffix", "csv", "image_labels"),
    *("task", "classes", "normal_images"),
)
"""Settings of `data` that say where images and labels are."""
RESUMABLE_CHANGES = (
    *("out", "plan", "plan_minutes", "device", "backend", "address"),
    *("offline", "baseline", "baseline_models", "log", "fit.num_workers"),
    *("segmenter.cache_dir", "segmenter.cache_gb", "model.force_normalization"),
    *(f"data.{name}" for name in (*SOURCES, "allow_leaks", "on_fault", "on_error")),
)
"""Settings that may differ when a run is resumed, as none changes a result.

Those of data are covered by the data's fingerprint, which `data.task` and the like change."""

_WEIGHTS, _SHA256 = "model.encoder_weights", "model.encoder_sha256"


def filled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by dotted name, with those that are younger than the run and without removed ones."""
    return BEFORE | {name: value for name, value in settings.items() if name not in REMOVED}


def signed(section: str, settings: Any) -> dict[str, Any]:
    """Settings of a section (a mapping, or its dataclass) as signatures hold them: without those at `BEFORE`."""
    if isinstance(settings, ModelConfig):
        settings = settings.signed_fields()
    values = asdict(settings) if is_dataclass(settings) else dict(settings)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {k: v for k, v in plain.items() if f"{section}.{k}" not in BEFORE or v != BEFORE[f"{section}.{k}"]}


def signed_sections(cfg: LoopConfig, *names: str) -> list[dict[str, Any]]:
    """`signed` of sections of `cfg`."""
    return [signed(name, getattr(cfg, name)) for name in names]


def differ(old: object, new: object) -> bool:
    """Whether two values of a setting are different; older runs hold paths with `~`."""
    is_home = isinstance(old, str) and old.startswith("~")
    return old != new and not (is_home and str(expanded(str(old))) == new)


def settings_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that forbid resuming, by name: (name, old value, new value). More rounds are an extension, no change.

    Those of the classifier count for sks alone.
    """
    old, new = filled(cli.flat(before)), filled(cli.flat(after))
    has_classifier = "sks" in str(new.get("model.name", "sks"))
    # The file of encoder weights may have moved: where both runs know its SHA-256, that is compared.
    is_same_file = old[_SHA256] is not None and old[_SHA256] == new[_SHA256]
    moved = _WEIGHTS if is_same_file else _SHA256 if old.get(_WEIGHTS) != new.get(_WEIGHTS) else ""
    return [
        (key, old.get(key), new.get(key))
        for key in sorted({*old, *new} - {*RESUMABLE_CHANGES, moved})
        if has_classifier or not key.startswith("classifier.")
        if differ(old.get(key), new.get(key))
        and not (key == "rounds" and isinstance(old.get(key), int) and new.get(key) >= old.get(key))
    ]


def as_flags(changes: Sequence[tuple[str, Any, Any]]) -> str:
    """Flags that give the old values of `settings_changes`."""
    texts = {key: old if isinstance(old, str) else json.dumps(old) for key, old, _ in changes}
    return " ".join(f"--{key} {shlex.quote(text)}" for key, text in texts.items())
