"""Names of devices, on a machine with and without GPUs."""

from __future__ import annotations

import pytest
import torch

from kmine.errors import UserError
from kmine.setup.device import require_device_name, resolve_device


@pytest.fixture
def gpus(monkeypatch):
    """Sets the number of GPUs that torch reports."""

    def report(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return report


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:x", "cuda:", "cuda:0 ", "", "mps"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UserError, match=r"^device: expected auto, cpu, cuda or cuda:N, got"):
        require_device_name(name)
    with pytest.raises(UserError, match="expected auto"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:12"])
def test_known_names_pass_whether_or_not_the_device_exists(name):
    require_device_name(name)


def test_auto_is_the_first_gpu_or_the_cpu(gpus):
    gpus(0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    gpus(2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2")])
def test_an_absent_gpu_is_refused_with_the_number_of_gpus(gpus, count, name):
    gpus(count)
    with pytest.raises(UserError, match=f"one of the {count} GPUs here, got '{name}'; use --device cpu or auto"):
        resolve_device(name)
