"""Checkpoints of a training in the run folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from kmine.store.run_folder import RunFolder
from kmine.training.task import Checkpoints
from kmine.training.train_steps import FitState


def _training_text(loss: float, score: float, name: str = "Dice") -> str:
    return f"loss {loss:.3f}" + f"  validation {name} {score:.3f}" * bool(np.isfinite(score))


def _save_state(store: RunFolder, folder: Any, state: FitState, signature: str) -> None:
    tensors, plain = state.to_tensors()
    store.save_tensors(folder / "fit_state.safetensors", tensors, signature, **plain)


def _read_trained(store: RunFolder, folder: Any, signature: str) -> Checkpoints | None:
    best = store.load_tensors(folder / "model.safetensors", signature)
    final = store.load_tensors(folder / "model_final.safetensors", signature)
    return Checkpoints(signature, best[0], final[0], best[1]["seconds"]) if best and final else None
