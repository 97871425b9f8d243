"""Facts of this machine."""

from __future__ import annotations

import pytest

from kmine.errors import UserError
from kmine.plan import machine
from kmine.plan.machine import free_memory, this_machine


def test_a_cpu_has_cores_and_memory_and_no_gpu():
    found = this_machine("cpu")
    assert found.cores >= 1 and not found.is_gpu and found.precision in ("32", "bf16")
    assert found.ram_gb > 0 == found.gpu_gb


def test_the_limit_of_a_container_is_the_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(machine, "CGROUPS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert free_memory() == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 2**30


def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"device: expected one of the \d+ GPUs here"):
        this_machine("cuda:99")
