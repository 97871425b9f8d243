"""The precision that `auto` stands for, by what the hardware has."""

from __future__ import annotations

import pytest
import torch

from kmine.training.precision import fastest_precision, resolve_precision


@pytest.mark.parametrize(("capabilities", "expected"), [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "32")])
def test_a_cpu_trains_in_bf16_only_with_amx(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fastest_precision(on_gpu=False) == expected


def test_a_torch_that_names_no_capabilities_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fastest_precision(on_gpu=False) == "32"


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_a_given_precision_stays(precision):
    assert resolve_precision(precision, on_gpu=False) == resolve_precision(precision, on_gpu=True) == precision


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16"), (False, "16")])
def test_a_gpu_that_emulates_bf16_trains_in_16_bits(monkeypatch, in_hardware, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: in_hardware or including_emulation
    )
    assert fastest_precision(on_gpu=True) == expected
