"""AdamW with parameter groups: rate of the encoder, no weight decay on norms and biases; its state by parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kmine.config import FitConfig

StateDict = dict[str, Tensor]


def make_optimizer(module: nn.Module, cfg: FitConfig) -> torch.optim.AdamW:
    """AdamW for `module`; a group's `factor` is its share of the learning rate.

    The encoder's parameters (of a module with `encoders()`, as `LocalModel`) have the factor `cfg.encoder_lr`.
    Parameters of one dimension, those of norms and biases, have no weight decay unless `cfg.decay_norms`.
    """
    encoders = module.encoders() if hasattr(module, "encoders") else []
    of_encoder = {id(p) for encoder in encoders for p in encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        factor = cfg.encoder_lr if id(parameter) in of_encoder else 1.0
        decay = cfg.weight_decay if cfg.decay_norms or parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()],
        lr=cfg.lr,
    )


def set_rate(optimizer: torch.optim.Optimizer, step: int, cfg: FitConfig) -> None:
    """Give each group its learning rate of `step`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg) * group["factor"]


def learning_rate(step: int, cfg: FitConfig) -> float:
    """Rate of `step` (0, 1, ...): linear warm-up over a share `cfg.warmup` of all steps, then cosine decay to zero."""
    warmup = cfg.warmup * cfg.steps
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cfg.steps - warmup)))


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, StateDict]:
    """State of each parameter, copied to the CPU, by its number in `module.parameters()`, whatever its group."""
    numbers = _numbers(optimizer, module)
    entries = optimizer.state_dict()["state"]
    return {
        str(numbers[place]): {k: torch.as_tensor(v).cpu().clone() for k, v in entry.items()}
        for place, entry in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, state: dict[str, StateDict]) -> None:
    """The inverse of `optimizer_state`; the groups keep their settings."""
    places: dict[int, int] = {number: place for place, number in enumerate(_numbers(optimizer, module))}
    entries: dict[int, Any] = {places[int(number)]: entry for number, entry in state.items()}
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbers(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[int]:
    """Number in `module.parameters()` of each parameter in the order of the groups, in which torch counts them."""
    number = {id(parameter): n for n, parameter in enumerate(module.parameters())}
    return [number[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
