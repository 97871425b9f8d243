"""Evaluation of predictions against given masks, and of a round on validation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG

from kmine.training.evaluation import compute_metrics, evaluate_checkpoint
from kmine.training.model_setup import new_model
from kmine.types import Sample


def test_hd95_is_in_pixels_throughout_unless_every_spacing_is_known(task_of, monkeypatch):
    task, _store = task_of(replace(CFG, rounds=0))
    model = new_model(task)
    how = {"num_classes": 2, "batch_size": 8, "device": task.fabric.device}
    spaced = [replace(task.val.sample(i), spacing=(2.0, 2.0)) for i in task.val.ids]
    monkeypatch.setattr(type(task.val), "sample", lambda self, i: next(s for s in spaced if s.sample_id == i))
    scores = {}
    for known in (True, False):
        monkeypatch.setattr(type(task.val), "in_mm", known)
        scores[known] = evaluate_checkpoint(task.val, model, model.state_dict(), **how).hd95
    assert scores[True] == pytest.approx(2 * scores[False]) and scores[False] > 0


def sample(sample_id: str, mask: np.ndarray | None) -> Sample:
    return Sample(sample_id, sample_id, np.zeros((4, 4, 3), np.uint8), mask)


def test_the_mean_is_over_cases_and_cases_are_kept():
    half = np.zeros((4, 4), np.uint8)
    half[:2] = 1
    quarter = np.zeros((4, 4), np.uint8)
    quarter[:1] = 1
    found = compute_metrics([(sample("a", half), half), (sample("b", half), quarter)], 2)
    assert [c.sample_id for c in found.cases] == ["a", "b"]
    assert found.dice == pytest.approx((1 + 2 / 3) / 2)
    assert found.iou == pytest.approx((1 + 0.5) / 2)


def test_a_sample_without_its_mask_is_our_own_mistake():
    with pytest.raises(ValueError, match="without its mask"):
        compute_metrics([(sample("a", None), np.zeros((4, 4), np.uint8))], 2)
