"""The run folder; see `kmine.store.run_folder`."""

from __future__ import annotations

from kmine.io.files import (
    read_json,
    safe_name,
    sign,
    write_atomic,
    write_json,
    writing,
)
from kmine.store.run_folder import (
    HARMLESS,
    PREPARED,
    BusyError,
    RunStore,
)

__all__ = [
    "HARMLESS",
    "PREPARED",
    "BusyError",
    "RunStore",
    "read_json",
    "safe_name",
    "sign",
    "write_atomic",
    "write_json",
    "writing",
]
