"""Threads: a pool for reading and decoding files, and how those of OpenMP wait for one another."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")
MAX_THREADS = 8
OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SAMPLES, SAMPLE_SECONDS = 10, 0.05
SPIN_COUNT = "10000"
"""Turns before a waiting thread sleeps."""


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


def choose_wait_policy() -> None:
    """Let OpenMP's threads spin for a moment while they wait, or sleep at once where others want the cores.

    Call it before torch is loaded. Spinning holds cores which other processes want, among them the very threads that
    are waited for; sleeping at once makes a training alone on its machine a third slower, so a moment of load must not
    lead to it (benchmarks/busy_machine.py). What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in OPENMP_SETTINGS):
        name, value = ("OMP_WAIT_POLICY", "PASSIVE") if _is_busy() else ("GOMP_SPINCOUNT", SPIN_COUNT)
        os.environ[name] = value


def _is_busy() -> bool:
    """Whether others keep half of the cores or more all the while; without Linux' /proc by the load of a minute."""
    cores = os.cpu_count() or 1
    try:
        for _ in range(SAMPLES):
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1  # without this one
            if running < cores / 2:
                return False
            time.sleep(SAMPLE_SECONDS)
        return True
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] >= cores / 2
