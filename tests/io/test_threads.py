"""The pool of threads, pending work after an error, and how OpenMP's threads wait."""

from __future__ import annotations

import os
import sys
from threading import Event, get_ident

import pytest

from kmine.io.threads import MAX_THREADS, OPENMP_SETTINGS, ahead, shorten_spinning, thread_pool


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (64, MAX_THREADS), (None, 1)])
def test_the_number_of_threads_is_that_of_the_cores_up_to_a_limit(monkeypatch, cores, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with thread_pool() as threads:
        assert threads._max_workers == expected


def test_results_of_map_keep_the_order_of_the_items():
    with thread_pool() as threads:
        assert list(threads.map(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_work_ahead_is_in_order_bounded_and_drawn_by_the_caller():
    drawn, used = [], []

    def items():
        for n in range(20):
            drawn.append(get_ident())
            assert len(drawn) - len(used) <= 3, "at most three drawn and not used up"
            yield n

    with thread_pool() as threads:
        for number, thread in ahead(threads, lambda n: (n, get_ident()), items(), depth=3):
            used.append(number)
            assert thread != get_ident()
    assert used == list(range(20)) and set(drawn) == {get_ident()}


def test_an_error_ahead_is_raised_at_its_place():
    with thread_pool() as threads:
        results = ahead(threads, lambda n: 6 // (3 - n), range(9), depth=4)
        assert [next(results) for _ in range(3)] == [2, 3, 6]
        with pytest.raises(ZeroDivisionError):
            next(results)


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


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded torch and whose user has set nothing of OpenMP."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in OPENMP_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)


def test_waiting_threads_sleep_after_a_moment(fresh):
    shorten_spinning()
    assert {name: os.environ[name] for name in OPENMP_SETTINGS if name in os.environ} == {"GOMP_SPINCOUNT": "10000"}


@pytest.mark.parametrize("name", OPENMP_SETTINGS)
def test_what_the_user_has_set_stays(fresh, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    shorten_spinning()
    assert dict(os.environ) == before


def test_once_torch_is_loaded_nothing_is_set(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    before = dict(os.environ)
    shorten_spinning()
    assert dict(os.environ) == before
