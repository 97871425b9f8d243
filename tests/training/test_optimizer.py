"""Groups of parameters, their rates, and the optimizer's state by parameter."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bars import network
from torch import nn

from kmine.config import FitConfig, ModelConfig
from kmine.models.build import build_model
from kmine.training.optimizer import (
    learning_rate,
    load_optimizer,
    make_optimizer,
    optimizer_state,
    set_rate,
)


def stepped(module: nn.Module, cfg: FitConfig) -> torch.optim.AdamW:
    """The optimizer after a step along gradients that differ by parameter."""
    optimizer = make_optimizer(module, cfg)
    for n, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, float(n + 1))
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["unet", "unetpp", "sks"])
def test_the_encoder_has_its_own_rate_and_norms_and_biases_no_decay(name):
    model = build_model(ModelConfig(name, "tu-mobilenetv3_small_050", levels=3), 2, 0)
    optimizer = make_optimizer(model, FitConfig(encoder_lr=0.1, lr=0.5, warmup=0.0, weight_decay=0.2))
    set_rate(optimizer, 0, FitConfig(lr=0.5, warmup=0.0))
    in_encoder = {id(p) for part in model.encoders() for p in part.parameters()}
    assert in_encoder and len(in_encoder) < len(list(model.parameters()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 if id(parameter) in in_encoder else 0.5)
            assert group["weight_decay"] == (0.2 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_settings_of_older_runs_give_one_group():
    optimizer = make_optimizer(network(), FitConfig(encoder_lr=1.0, decay_norms=True))
    assert len(optimizer.param_groups) == 1


def test_the_state_of_a_run_with_one_group_fits_several_and_back():
    """States are numbered by `module.parameters()`, as older runs saved them."""
    model = network()
    one, several = FitConfig(decay_norms=True, lr=0.1), FitConfig(decay_norms=False, lr=0.1)
    state = optimizer_state(stepped(model, one), model)
    for n, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(state[str(n)]["exp_avg"], torch.full_like(parameter, 0.1 * (n + 1)))
    optimizer = make_optimizer(model, several)
    assert len(optimizer.param_groups) == 2
    load_optimizer(optimizer, model, state)
    again = optimizer_state(optimizer, model)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[n][key], again[n][key]) for n in state for key in state[n])


def test_learning_rate_rises_then_decays_to_zero():
    cfg = FitConfig(lr=1.0, warmup=0.1, steps=100)
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    assert learning_rate(0, FitConfig(warmup=0.0, steps=1)) == pytest.approx(1e-3)
    assert not any(math.isnan(r) for r in rates)
