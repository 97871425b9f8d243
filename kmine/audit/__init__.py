"""`kmine audit`: pseudo masks and given masks of a finished run, the most suspicious first."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["audit_run", "find_label_issues"]


def __getattr__(name: str) -> Any:
    # Lazy: --help of the command needs neither OpenCV nor torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kmine.audit.{'run' if name == 'audit_run' else 'label_issues'}"), name)
