"""Rounds without mining: what each starts from, and when they end. Training and evaluation are replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kmine.training import rounds
from kmine.training.rounds import train_rounds, trained_auxiliary_model


@pytest.fixture
def trained(monkeypatch):
    """Arguments of every training; round 2 is refused. Checkpoints and results are the numbers of their rounds."""
    calls = []

    def train(task, model, *, round_idx, start=None, **inputs):
        calls.append({"round_idx": round_idx, "start": start, **inputs})
        return round_idx

    def evaluate_round(task, model, checkpoints, *, round_idx, reference=None, num_pseudo=0, method_dir=""):
        calls[-1]["reference"] = reference.round_idx if reference else None
        calls[-1]["num_pseudo"] = num_pseudo
        return SimpleNamespace(round_idx=round_idx, adopted=round_idx != 2)

    for function in (train, evaluate_round):
        monkeypatch.setattr(rounds, function.__name__, function)
    monkeypatch.setattr(rounds, "new_model", lambda task: "model")
    return calls


TASK = SimpleNamespace(cfg=SimpleNamespace(rounds=3, retrain=False), auxiliary_model=None)


def test_each_round_starts_from_the_last_adopted_one(trained):
    assert [result.round_idx for result in train_rounds(TASK, "supervised")] == [0, 1, 2, 3]
    assert [call["start"] for call in trained] == [None, 0, 1, 1]
    assert [call["reference"] for call in trained] == [None, 0, 1, 1]
    assert [call.get("method_dir") for call in trained] == ["", *["supervised"] * 3], "round 0 is shared"
    trained.clear()
    list(train_rounds(TASK, "own", first_dir="own"))
    assert [call["method_dir"] for call in trained] == ["own"] * 4


def test_inputs_of_a_round_reach_its_training_and_none_ends_the_rounds(trained):
    inputs = {1: {"pseudo": ["a", "b"], "pseudo_signature": "x"}, 2: None}
    assert len(list(train_rounds(TASK, "oracle", inputs.get))) == 2
    assert trained[1]["pseudo"] == ["a", "b"] and trained[1]["pseudo_signature"] == "x"
    assert [call["num_pseudo"] for call in trained] == [0, 2]


def test_a_task_with_one_model_has_no_auxiliary_model(trained):
    assert trained_auxiliary_model(TASK) is None and trained == []
