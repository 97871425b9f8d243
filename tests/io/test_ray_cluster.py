"""A Ray cluster is joined or started, left in the end, and its absence is one line. Ray itself is replaced."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kmine.errors import UserError
from kmine.io.ray_cluster import ray_cluster


@pytest.fixture
def ray(monkeypatch):
    """Stands for the module ray; `calls` are what was done with it."""
    calls = []
    module = SimpleNamespace(
        calls=calls,
        is_initialized=lambda: False,
        init=lambda **how: calls.append(how),
        shutdown=lambda: calls.append("left"),
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def test_a_cluster_is_started_here_or_joined_and_left(ray):
    with ray_cluster(None, "x", num_cpus=2) as module:
        assert module is ray
    with pytest.raises(ZeroDivisionError), ray_cluster("auto", "x", num_cpus=2):
        _ = 1 / 0
    started, left, joined, left_too = ray.calls
    assert (started["address"], started["num_cpus"], joined["address"]) == ("local", 2, "auto")
    assert left == left_too == "left" and "num_cpus" not in joined


def test_a_cluster_that_is_there_is_used_and_stays(ray):
    ray.is_initialized = lambda: True
    with ray_cluster(None, "x"):
        pass
    assert ray.calls == []


def test_no_cluster_at_an_address_is_one_line_before_ray_tries(ray):
    with pytest.raises(UserError, match=r"expected a Ray cluster at ray://127.0.0.1:1, cannot reach it"):
        ray_cluster("ray://127.0.0.1:1", "x").__enter__()
    assert ray.calls == []


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kmine\[ray\]', or use --processes$"):
        ray_cluster(None, "use --processes").__enter__()
