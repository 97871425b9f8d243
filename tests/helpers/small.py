"""A task small enough for a test, on a phantom of 24 images."""

from __future__ import annotations

import torch

from kmine.config import (
    DataConfig,
    FitConfig,
    GateConfig,
    InferConfig,
    LoopConfig,
    ModelConfig,
    RefineConfig,
)
from kmine.mining.context import RoundContext
from kmine.store.run_folder import RunFolder
from kmine.store.tables import DecisionRow

ANYTHING_GOES = GateConfig(
    min_predicted_iou=0,
    min_stability=0,
    min_agreement=0,
    min_jitter_dice=0,
    min_confidence=0,
    max_confidence_outside=1,
    max_tta_std=1,
    max_area_ratio=1e6,
)
CFG = LoopConfig(
    rounds=2,
    data=DataConfig(num_samples=24, size=32, label_fraction=0.3, val_fraction=0.2),
    model=ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=8, encoder_depth=3),
    fit=FitConfig(steps=12, round_steps=6, batch_size=4, val_every=6),
    infer=InferConfig(tta="none"),
    gate=ANYTHING_GOES,
    refine=RefineConfig(ask_local=False),
)


class Silent:
    """A watcher that only remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None:
        self.said.append(text)


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
