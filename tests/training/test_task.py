"""The task of one process among several, and the seconds of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from kmine.training import task as task_module
from kmine.training.distributed import SingleDevice
from kmine.training.task import StageTimer, single_process


@dataclass(frozen=True)
class SmallTask:
    cfg: SimpleNamespace
    fabric: SingleDevice


def test_single_process_changes_the_device_context_of_several_processes_only(monkeypatch):
    cfg = SimpleNamespace(device="cpu", fit=SimpleNamespace(precision="32"))
    monkeypatch.setattr(task_module, "make_fabric", lambda *args, local: (*args, local))
    cpu = torch.device("cpu")
    one, several = (SmallTask(cfg, SingleDevice(cpu, world_size=size)) for size in (1, 2))
    assert single_process(one) is one
    assert single_process(several).fabric == ("cpu", "32", True)


def test_seconds_of_a_stage_add_up(monkeypatch):
    clock = iter([2.0, 3.0, 7.0])
    monkeypatch.setattr(task_module.time, "perf_counter", lambda: next(clock))
    timer = StageTimer(last=0.0)
    timer.lap("read")
    timer.lap("infer")
    timer.lap("read")
    assert timer.seconds == {"read": 2.0 + 4.0, "infer": 1.0}
