"""The task of one process among several, and the seconds of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kmine.errors import UserError
from kmine.training import task as task_module
from kmine.training.distributed import SingleDevice
from kmine.training.task import StageTimer, Task, single_process


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
    clock = iter([2.0, 3.0, 7.0, 11.0])
    monkeypatch.setattr(task_module.time, "perf_counter", lambda: next(clock))
    timer = StageTimer(last=0.0)
    timer.lap("read")
    timer.lap("infer")
    timer.lap("read")
    assert timer.seconds == {"read": 2.0 + 4.0, "infer": 1.0}
    timer.share_lap({"gate": 0.3, "read": 0.1})
    assert timer.seconds == pytest.approx({"read": 6.0 + 1.0, "infer": 1.0, "gate": 3.0})


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (np.zeros((2, 3)), None),
        (np.array([[0, 1, 2], [255, 0, 0]]), None),
        (
            np.zeros((3, 2)),
            r"expected a pseudo mask of a of \(2, 3\) pixels, got \(3, 2\); remove it and run the command",
        ),
        (np.full((2, 3), 3), "expected a pseudo mask of a of the class ids 0 to 2 and 255, got 3; remove it"),
    ],
)
def test_a_pseudo_mask_of_another_image_is_refused(mask, problem):
    files = SimpleNamespace(path=lambda name: f"{name}.parquet")
    run = SimpleNamespace(pseudo_mask=lambda *_: mask, masks=lambda number: files)
    task = SimpleNamespace(run=run, unlabeled=SimpleNamespace(native_shape=lambda name: (2, 3)), num_classes=3)
    if problem is None:
        assert Task.pseudo_mask(task, 1, "a") is mask
        return
    with pytest.raises(UserError, match=f"^a.parquet: {problem}"):
        Task.pseudo_mask(task, 1, "a")
