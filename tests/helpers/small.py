"""A task small enough for a test, on a phantom of 24 images, and parts to build others from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kmine.config import (
    DataConfig,
    FitConfig,
    GateConfig,
    InferConfig,
    LoopConfig,
    ModelConfig,
    RefineConfig,
)
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.mining.context import RoundContext
from kmine.segmenters.base import Segmenter
from kmine.setup.open import open_task
from kmine.store.run_folder import RunFolder
from kmine.store.tables import DecisionRow
from kmine.training import trainer
from kmine.training.fit import UnlabeledViews
from kmine.training.task import Task

ANYTHING_GOES = GateConfig(mode="ranked", keep=1.0)
CFG = LoopConfig(
    rounds=2,
    retrain=False,
    data=DataConfig(num_samples=24, size=32, label_fraction=0.3, val_fraction=0.2),
    model=ModelConfig(encoder="tu-mobilenetv3_small_050", encoder_weights=None, decoder_channels=8, encoder_depth=3),
    fit=FitConfig(steps=12, round_steps=6, batch_size=4, val_every=6, ema_decay=0.0, checkpoint="best"),
    infer=InferConfig(tta="none"),
    gate=ANYTHING_GOES,
    refine=RefineConfig(ask_local=False, doubt=None),
    crossfit=1,
)


class Silent:
    """A `ProgressReporter` that keeps the logged lines in `said`."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None:
        self.said.append(text)


def build_task(
    folder: Path, cfg: LoopConfig, name: str = "run", segmenter: Segmenter | None = None
) -> tuple[Task, RunFolder]:
    """Task and run folder `name` below `folder`, which holds the cache too."""
    cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(folder / "cache")))
    store = RunFolder(folder / name)
    task = open_task(cfg, open_source(cfg.data), store, Silent())
    return (replace(task, segmenter=segmenter) if segmenter else task), store


def copy_task(task: Task, store: RunFolder, folder: Path) -> tuple[Task, RunFolder]:
    """The same task in a copy of its run folder, with the lines said so far."""
    progress, copy = Silent(), RunFolder(shutil.copytree(store.root, folder))
    progress.said += task.progress.said
    return replace(task, run=copy, progress=progress), copy


def decision(sample_id: str, estimated: float | None, reason: str = "kept", object_idx: int = 0) -> DecisionRow:
    """A row of an image in training."""
    kept = reason in ("kept", "lesion_free")
    return DecisionRow(sample_id, object_idx, 1, kept, reason, in_training=True, estimated_dice=estimated)


def context(task, model=None, segmenter=None, round_idx: int = 1) -> RoundContext:
    """The context of a round of `task` without auxiliary model, calibration or pending batches."""
    return RoundContext(task, model, None, segmenter or task.segmenter, task.unlabeled, {}, round_idx)


def weights(store: RunFolder, round_idx: int, arm: str = "", name: str = "model_final") -> dict[str, torch.Tensor]:
    return store.load_tensors(store.round_dir(round_idx, arm) / f"{name}.safetensors", None)[0]


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def truth_of(task, ids=None) -> Pool:
    """The unlabeled images of a task, or some of them, with their true masks."""
    pool = task.unlabeled
    return Pool(pool._cache, ids or pool.ids, pool._groups, "true")


def record_steps(monkeypatch) -> list[int]:
    """The optimizer steps of each training from now on."""
    steps, real = [], trainer.fit

    def fit(model, batches, cfg, **kwargs):
        steps.append(cfg.steps)
        return real(model, batches, cfg, **kwargs)

    monkeypatch.setattr(trainer, "fit", fit)
    return steps


class ChannelModel(nn.Module):
    """Logits of class 1 are the image's first channel times a weight, those of class 0 are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        first = images[:, :1].float() * self.scale
        return torch.cat([torch.zeros_like(first), first], dim=1)


def views_of(weak, strong, valid=None, source=None) -> UnlabeledViews:
    """Views of one-channel values (U, H, W)."""
    weak, strong = (torch.as_tensor(v)[:, None].repeat(1, 3, 1, 1) for v in (weak, strong))
    shape = (len(weak), *weak.shape[2:])
    own = torch.arange(len(weak))[:, None, None].expand(shape)
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return UnlabeledViews(weak, strong, valid, own if source is None else torch.as_tensor(source))
