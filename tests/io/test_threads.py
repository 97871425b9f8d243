"""The pool of threads: number of threads, and pending work after an error."""

from __future__ import annotations

import os
from threading import Event

import pytest

from kmine.io.threads import MAX_THREADS, thread_pool


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (64, MAX_THREADS), (None, 1)])
def test_the_number_of_threads_is_that_of_the_cores_up_to_a_limit(monkeypatch, cores, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with thread_pool() as threads:
        assert threads._max_workers == expected


def test_results_of_map_keep_the_order_of_the_items():
    with thread_pool() as threads:
        assert list(threads.map(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_an_error_drops_pending_work_and_waits_for_running_work(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    started, go_on, done = Event(), Event(), []

    def work(item: int) -> None:
        started.set()
        go_on.wait(10)
        done.append(item)

    with pytest.raises(ValueError, match="reader failed"), thread_pool() as threads:
        running, *pending = [threads.submit(work, item) for item in range(5)]
        assert started.wait(10)
        running.add_done_callback(lambda future: done.append("finished"))
        threads.submit(work, 5).add_done_callback(lambda future: go_on.set())  # cancelled on exit
        raise ValueError("reader failed")
    assert done == [0, "finished"]
    assert all(future.cancelled() for future in pending)


def test_a_closed_pool_accepts_no_work():
    with thread_pool() as threads:
        pass
    with pytest.raises(RuntimeError):
        threads.submit(abs, -1)
