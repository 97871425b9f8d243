"""A training of a fraction of a second: a small network learns which pixels are bright."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kmine.config import FitConfig
from kmine.data.batches import Batch
from kmine.models.base import LocalModel
from kmine.training.distributed import make_fabric
from kmine.training.fit import fit
from kmine.training.train_steps import Callbacks, FitResult, FitState

CFG = FitConfig(steps=24, batch_size=4, lr=0.02, val_every=4, ema_decay=0.0)
AVERAGED = replace(CFG, ema_decay=0.9)


class Bars:
    """Batches in which bright pixels are class 1; the left column is ignored."""

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        masks = (rng.random((4, 8, 8)) < 0.5).astype(np.uint8)
        images = np.repeat((60 + 130 * masks)[..., None], 3, axis=-1).astype(np.uint8)
        masks[:, :, 0] = 255
        return Batch(images, masks, np.ones(4, np.float32))

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[Batch]:
        return (self[step] for step in range(start, stop))


def network() -> LocalModel:
    """A network with batch norm and dropout, always with the same weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 2, 1)
    )
    return LocalModel(net, 2, 1, "half")


def accuracy(model: nn.Module) -> float:
    """Share of correct pixels in a batch that no training sees."""
    batch = Bars()[1000]
    with torch.inference_mode():
        pred = model(torch.from_numpy(batch.images).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    return float((pred == batch.masks)[batch.masks != 255].mean())


def train(
    cfg: FitConfig = CFG,
    *,
    model: LocalModel | None = None,
    batches: Any = None,
    validate: Callable[[LocalModel], float] = accuracy,
    save: Callable[[FitState], None] | None = None,
    seed: int = 3,
    **more: Any,
) -> tuple[LocalModel, FitResult]:
    """The trained model and the result of `fit`."""
    model, fabric = model or network(), make_fabric("cpu", "32")
    callbacks = Callbacks(validate=validate, save=save)
    return model, fit(model, batches or Bars(), cfg, fabric=fabric, seed=seed, callbacks=callbacks, **more)


def saved_states(train: Callable[..., Any]) -> list[FitState]:
    """The states that `train(save=...)` saves, each written to tensors and read again."""
    states: list[FitState] = []
    train(save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())))
    return states
