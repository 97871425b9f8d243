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
SAMPLES, SAMPLE_SECONDS = 5, 0.01


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
    """Let OpenMP's threads sleep while they wait if other processes want the cores; call it before torch is loaded.

    Threads that spin are faster on an idle machine; beside other busy processes they hold the cores which the threads
    need that they wait for (benchmarks/busy_machine.py). What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in OPENMP_SETTINGS) and _is_busy():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _is_busy() -> bool:
    """Whether other processes use half of the cores or more; without Linux' /proc by the load of the last minute."""
    cores = os.cpu_count() or 1
    try:
        running = []
        for _ in range(SAMPLES):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(SAMPLE_SECONDS)
        return sum(running) / SAMPLES >= cores / 2
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] >= cores / 2
