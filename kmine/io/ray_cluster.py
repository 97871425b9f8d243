"""A Ray cluster whose nodes share folders, data and kmine; the only module that imports ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kmine.errors import UserError


def import_ray(instead: str) -> Any:
    """The module ray. Raises `UserError` where it is not installed, with what to do `instead`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network access unless requested
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"backend ray: expected the package ray, it is not installed; pip install 'kmine[ray]', or {instead}"
        ) from error
    return ray


@contextmanager
def ray_cluster(address: str | None, instead: str, num_cpus: int | None = None) -> Iterator[Any]:
    """The module ray, connected to the cluster at `address`, or to one of `num_cpus` processors that is started here.

    What was started or joined is left at the end.

    Raises:
        UserError: ray is not installed, or no cluster at the address.
    """
    ray = import_ray(instead)
    if ray.is_initialized():
        yield ray
        return
    local = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon and port.isdigit():  # ray itself would retry an unreachable address for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"address: expected a Ray cluster at {address or 'this machine'}, cannot reach it ({error}); start one "
            "with `ray start --head`, or omit --address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
