"""The run folder; see `kmine.store.run_folder`."""

from __future__ import annotations

from kmine.io.files import (
    atomic_open,
    read_json,
    safe_name,
    sign,
    write_atomic,
    write_json,
)
from kmine.store.run_folder import (
    FOLD_TRAININGS,
    RESUMABLE_CHANGES,
    BusyError,
    RunFolder,
)

__all__ = [
    "RESUMABLE_CHANGES",
    "FOLD_TRAININGS",
    "BusyError",
    "RunFolder",
    "read_json",
    "safe_name",
    "sign",
    "write_atomic",
    "write_json",
    "atomic_open",
]
