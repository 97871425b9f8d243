"""Checkpoint files: read back under the same signature, the state only while the training is unfinished."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kmine.store.run_folder import RunFolder
from kmine.training.checkpoints import Checkpointer
from kmine.training.train_steps import FitResult, FitState


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


STATE = FitState(
    step=4,
    model=weights(1),
    optimizer={"0": {"step": torch.tensor(4.0), "exp_avg": torch.ones(2)}},
    best=weights(2),
    best_score=0.5,
    best_step=2,
    history=[(2, 0.7, 0.5), (4, 0.6, 0.4)],
    average=weights(3),
)
RESULT = FitResult(best=weights(2), best_step=2, final=weights(1), history=STATE.history)


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(RunFolder(tmp_path), tmp_path / "round_00", "a")


def test_a_finished_training_is_read_back_and_its_state_deleted(checkpointer):
    checkpointer.save_state(STATE)
    saved = checkpointer.save(RESULT, 1.5)
    read = checkpointer.load()
    for checkpoints in (saved, read):
        assert (checkpoints.signature, checkpoints.seconds) == ("a", 1.5)
        assert torch.equal(checkpoints.best["w"], weights(2)["w"])
        assert torch.equal(checkpoints.final["w"], weights(1)["w"])
    assert sorted(p.name for p in checkpointer.folder.iterdir()) == ["model.safetensors", "model_final.safetensors"]
    _, meta = checkpointer.load_best()
    assert (meta["best_step"], meta["history"]) == (2, [[2, 0.7, 0.5], [4, 0.6, 0.4]])


def test_a_state_comes_back_as_it_was(checkpointer):
    assert checkpointer.load_state() is None
    checkpointer.save_state(STATE)
    state = checkpointer.load_state()
    for name in ("model", "best", "average"):
        assert torch.equal(getattr(state, name)["w"], getattr(STATE, name)["w"])
    assert state.optimizer["0"].keys() == {"step", "exp_avg"} and state.optimizer["0"]["step"] == 4
    assert (state.step, state.best_score, state.best_step, state.history) == (4, 0.5, 2, STATE.history)


def test_files_of_another_signature_are_not_read(checkpointer):
    checkpointer.save(RESULT, 1.5)
    checkpointer.save_state(STATE)
    other = replace(checkpointer, signature="b")
    assert (other.load(), other.load_best(), other.load_state()) == (None, None, None)


@pytest.mark.parametrize("name", ["model.safetensors", "model_final.safetensors"])
def test_without_both_checkpoints_a_training_is_unfinished_and_its_state_kept(checkpointer, name):
    checkpointer.save(RESULT, 1.5)
    checkpointer.save_state(STATE)
    (checkpointer.folder / name).unlink()
    assert checkpointer.load() is None and checkpointer.load_state() is not None


def test_only_the_process_that_writes_the_checkpoints_deletes_the_state(checkpointer):
    checkpointer.save_state(STATE)
    follower = replace(checkpointer, run=RunFolder(checkpointer.run.root, follows=True))
    follower.save(RESULT, 1.5)
    assert checkpointer.load() is None and checkpointer.load_state() is not None, "a kill would cost the training"
    checkpointer.save(RESULT, 1.5)
    assert checkpointer.load_state() is None and follower.load() is not None


def test_a_state_left_beside_finished_checkpoints_is_deleted(checkpointer):
    checkpointer.save(RESULT, 1.5)
    checkpointer.save_state(STATE)
    assert checkpointer.load() is not None and checkpointer.load_state() is None
