"""The run folder; see `kmine.store.run_store`."""

from __future__ import annotations

from kmine.store.files import sign, write_atomic
from kmine.store.run_store import HARMLESS, RunStore

__all__ = ["HARMLESS", "RunStore", "sign", "write_atomic"]
