"""The run folder; see `kmine.store.run_store`."""

from __future__ import annotations

from kmine.store.files import read_json, safe_name, sign, write_atomic, write_json, writing
from kmine.store.run_store import HARMLESS, PREPARED, BusyError, RunStore

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
