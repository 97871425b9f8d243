"""Threads: a pool for reading and decoding files, and how those of OpenMP wait for one another."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")
MAX_THREADS = 8
OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SPIN_COUNT = "10000"
"""Turns before a waiting thread sleeps; libgomp's own are 300,000."""


@contextlib.contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool that drops pending work on exit."""
    executor = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[ItemT], ResultT], items: Iterable[ItemT], depth: int = 2
) -> Iterator[ResultT]:
    """Results of `work` on the items, in order; threads of `pool` work while this one draws items or uses results.

    At most `depth` items are drawn and not used up. An error of `work` is raised at its item's place.
    """
    waiting: deque[Future[ResultT]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        del item
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def shorten_spinning() -> None:
    """Let OpenMP's threads sleep after a moment of waiting, unless the user has set how they wait.

    Call it before torch is loaded. A thread that spins holds a core that other processes want, among them the threads
    it waits for. Short spinning costs nothing on an idle machine and is as good as sleeping at once on a busy one
    (benchmarks/busy_machine.py).
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in OPENMP_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
