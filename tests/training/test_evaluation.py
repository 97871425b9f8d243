"""What a round is worth on validation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG

from kmine.training.evaluation import evaluate_on
from kmine.training.model_setup import new_model


def test_hd95_is_in_pixels_throughout_unless_every_spacing_is_known(task_of, monkeypatch):
    task, store = task_of(replace(CFG, rounds=0))
    model = new_model(task, store)
    how = {"num_classes": 2, "batch_size": 8, "device": task.fabric.device}
    spaced = [replace(task.val.sample(i), spacing=(2.0, 2.0)) for i in task.val.ids]
    monkeypatch.setattr(type(task.val), "sample", lambda self, i: next(s for s in spaced if s.sample_id == i))
    scores = {}
    for known in (True, False):
        monkeypatch.setattr(type(task.val), "in_mm", known)
        scores[known] = evaluate_on(task.val, model, model.state_dict(), **how).hd95
    assert scores[True] == pytest.approx(2 * scores[False]) and scores[False] > 0
