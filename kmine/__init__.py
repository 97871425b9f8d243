"""kmine: semi-supervised medical image segmentation by knowledge mining.

The public API, loaded at first use: `import kmine` alone loads neither torch nor pandas. See docs/api.md.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "ArrayDataset": "kmine.api.arrays",
    "KnowledgeMiner": "kmine.api.miner",
    "Predictor": "kmine.api.predictor",
    "Run": "kmine.api.run",
    "open_run": "kmine.api.run",
    "audit_run": "kmine.audit.run",
    "compare_runs": "kmine.compare.engine",
    "check_dataset": "kmine.check.findings",
    "find_label_issues": "kmine.audit.label_issues",
    "create_model": "kmine.models.build",
    "create_segmenter": "kmine.segmenters",
    "register_dataset": "kmine.data",
    "register_method": "kmine.methods.registry",
    "register_segmenter": "kmine.segmenters",
    "DataConfig": "kmine.config",
    "LoopConfig": "kmine.config",
    "UserError": "kmine.errors",
}
_MODULES = {"metrics": "kmine.ops.metrics", "statistics": "kmine.ops.statistics"}
__all__ = ["__version__", *_PUBLIC, *_MODULES]


def _name_the_user() -> None:
    """Give libraries the names that they ask the system for, where the user id has no entry (docker run --user).

    Without HOME they would write into a folder named `~`; kmine's cache stands in for it where KMINE_CACHE is set.
    """
    try:
        import pwd
    except ImportError:  # Windows
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["LOGNAME"] = f"uid{os.getuid()}"
        if "HOME" not in os.environ and "KMINE_CACHE" in os.environ:
            os.environ["HOME"] = os.environ["KMINE_CACHE"]


_name_the_user()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
