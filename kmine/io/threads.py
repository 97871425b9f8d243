"""A pool of threads for reading and decoding files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

MAX_THREADS = 8


@contextlib.contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool that drops pending work on exit."""
    executor = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
