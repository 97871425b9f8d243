"""Which settings of a run may differ when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kmine import cli
from kmine.io.errors import expanded

SOURCES = (
    "cache_dir",
    "root",
    "images",
    "masks",
    "mask_suffix",
    "csv",
    "image_labels",
    "task",
    "classes",
    "normal_images",
)
"""Settings of `data` that say where images and labels are."""
RESUMABLE_CHANGES = (
    *("out", "device", "offline", "baseline", "baseline_models", "fit.num_workers"),
    *("segmenter.cache_dir", "segmenter.cache_gb"),
    *(f"data.{name}" for name in (*SOURCES, "allow_leaks", "on_fault", "on_error")),
)
"""Settings that may differ when a run is resumed, as none changes a result.

Those of data are covered by the data's fingerprint, which `data.task` and the like change."""


def differ(old: object, new: object) -> bool:
    """Whether two values of a setting are different; older runs hold paths with `~`."""
    is_home = isinstance(old, str) and old.startswith("~")
    return old != new and not (is_home and str(expanded(str(old))) == new)


def settings_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that forbid resuming, by name: (name, old value, new value). More rounds are an extension, no change."""
    old, new = cli.flat(before), cli.flat(after)
    return [
        (key, old.get(key), new.get(key))
        for key in sorted({*old, *new} - {*RESUMABLE_CHANGES})
        if differ(old.get(key), new.get(key))
        and not (key == "rounds" and isinstance(old.get(key), int) and new.get(key) >= old.get(key))
    ]
