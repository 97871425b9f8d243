"""The mean teacher by hand: averaged weights, a rising weight, a squared difference."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.small import CFG, ChannelModel, views_of

from kmine.config import TeacherConfig
from kmine.io.files import sign
from kmine.methods import mean_teacher
from kmine.methods.mean_teacher import mean_teacher_consistency, ramp_up, squared_difference
from kmine.training import rounds
from kmine.training.ema import EMA


def test_the_teacher_has_the_averaged_weights_and_its_weight_rises():
    model = ChannelModel()
    ema = EMA(model, 0.99)
    with torch.no_grad():
        model.scale.fill_(3.0)
    ema.update(0)  # 1/10 x 1 + 9/10 x 3 = 2.8
    views = views_of([[[1, -1]]], [[[7, 7]]], valid=[[[True, False]]])
    consistency_fn = mean_teacher_consistency(TeacherConfig(weight=10.0, ramp_up=0.5), 8)
    teacher_prob = 1 / (1 + math.exp(-2.8))
    for step, ramp in ((0, math.exp(-5)), (2, math.exp(-5 / 4)), (4, 1.0), (7, 1.0)):
        target = consistency_fn(model, views, step, ema)
        assert target.images[:, 0].tolist() == [[[7, 7]]] and target.perturbed is None
        loss = target.loss(torch.zeros(1, 2, 1, 2)).item()
        assert loss == pytest.approx(10 * ramp * (teacher_prob - 0.5) ** 2, rel=1e-4), (
            "the invalid pixel does not count"
        )
    assert model.scale.item() == 3.0


@pytest.mark.parametrize("ramp_up", [0.5, 0.0])
def test_the_ramp_of_the_retrained_model_is_a_share_of_its_own_steps(task_of, monkeypatch, ramp_up):
    """Rounds keep the signature that they had; the retrained model has another, unless there is no ramp."""
    cfg = TeacherConfig(ramp_up=ramp_up)
    task, _ = task_of(replace(CFG, retrain=True, teacher=cfg))
    trained = []

    def train(task, model, *, consistency=None, **place):
        trained.append((task.cfg.fit.round_steps, consistency))

    def evaluate_round(*_, round_idx, **__):
        return SimpleNamespace(round_idx=round_idx, adopted=True, metrics=SimpleNamespace(score=0.0))

    for name, stand_in in (("train", train), ("evaluate_round", evaluate_round), ("new_model", lambda task: None)):
        monkeypatch.setattr(rounds, name, stand_in)
    lengths = []
    monkeypatch.setattr(
        mean_teacher, "mean_teacher_consistency", lambda cfg, steps: lengths.append(steps) or (lambda *_: None)
    )
    list(mean_teacher.mean_teacher(task))
    (_, none), *in_rounds, (steps, once) = trained
    assert none is None and len(in_rounds) == 2 and steps == 12 + 2 * 6 and lengths == [6, 6, 24]
    assert {own.signature for _, own in in_rounds} == {sign("mean_teacher", asdict(cfg))}
    assert (once.signature == in_rounds[0][1].signature) == (ramp_up == 0) and once.ema_decay == cfg.decay


def test_the_ramp_rises_to_one_and_without_length_is_one():
    assert [ramp_up(step, 0) for step in (0, 5)] == [1.0, 1.0]
    assert np.all(np.diff([ramp_up(step, 10) for step in range(11)]) > 0) and ramp_up(10, 10) == ramp_up(99, 10) == 1.0


def test_the_squared_difference_is_a_mean_over_valid_pixels_and_classes():
    logits = torch.zeros(1, 2, 1, 2)
    teacher_probs = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert squared_difference(logits, teacher_probs, valid).item() == pytest.approx(0.25 / 2)
    assert squared_difference(logits, teacher_probs, valid & False).item() == 0
