"""Checkpoints of a training in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from kmine.store.run_folder import RunFolder
from kmine.training.train_steps import FitResult, FitState, StateDict


@dataclass(frozen=True)
class Checkpoints:
    """Best and final weights of a training."""

    signature: str
    """Of everything the training depends on."""
    best: StateDict
    """Weights that are used, by `fit.checkpoint`."""
    final: StateDict
    """Weights after the last step."""
    seconds: float
    """Duration of the training."""
    history: Sequence[tuple[int, float, float]] = ()
    """As in `FitResult`, and so is `clock`."""
    clock: Sequence[tuple[float, float]] = ()

    @property
    def is_last_used(self) -> bool:
        """Whether the weights that are used are those of the last step."""
        return all(torch.equal(self.best[name], tensor) for name, tensor in self.final.items())


@dataclass(frozen=True)
class Checkpointer:
    """Reads and writes the files of one training: best and final weights, and the state to resume from."""

    SAVE_EVERY_S: ClassVar[float] = 60.0
    """Seconds between two states: what a kill costs, or `fit.val_every` steps where these take longer. Own choice."""
    run: RunFolder
    folder: Path
    signature: str
    """Of everything the training depends on; files with another signature are not read."""

    def load(self) -> Checkpoints | None:
        """The checkpoints of a finished training; None where one is missing, damaged or of another signature."""
        best = self.load_best()
        final = self.run.load_tensors(self.folder / "model_final.safetensors", self.signature)
        if not best or not final:
            return None
        self._discard_state()  # left behind by a kill just before the end
        curves = (best[1].get(name, ()) for name in ("history", "clock"))
        return Checkpoints(self.signature, best[0], final[0], best[1]["seconds"], *curves)

    def save(self, result: FitResult, seconds: float) -> Checkpoints:
        """Write both checkpoints; training took `seconds`."""
        self.run.save_tensors(self.folder / "model_final.safetensors", result.final, self.signature)
        # The best checkpoint is written last: it marks the training as finished.
        curves = {"history": result.history, "clock": result.clock}
        self.save_best(result.best, best_step=result.best_step, seconds=seconds, **curves)
        return Checkpoints(self.signature, result.best, result.final, seconds, **curves)

    def load_best(self) -> tuple[StateDict, dict[str, Any]] | None:
        """Weights and metadata of the best checkpoint; None as in `load`."""
        return self.run.load_tensors(self.folder / "model.safetensors", self.signature)

    def save_best(self, weights: StateDict, **meta: Any) -> None:
        """Write the best checkpoint and delete the state."""
        self.run.save_tensors(self.folder / "model.safetensors", weights, self.signature, **meta)
        self._discard_state()

    def load_state(self) -> FitState | None:
        """State of an interrupted training; None as in `load`."""
        saved = self.run.load_tensors(self._state_path, self.signature)
        return FitState.from_tensors(*saved) if saved else None

    def save_state(self, state: FitState) -> None:
        """Write the state of a training in progress."""
        tensors, plain = state.to_tensors()
        self.run.save_tensors(self._state_path, tensors, self.signature, **plain)

    @property
    def _state_path(self) -> Path:
        return self.folder / "fit_state.safetensors"

    def _discard_state(self) -> None:
        if not self.run.follows:  # only the process that writes the finished weights knows that they are there
            self._state_path.unlink(missing_ok=True)
