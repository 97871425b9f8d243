"""Losses of a step: pseudo-labeled images with feature dropout, unlabeled images beside the labeled ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.bars import AVERAGED, CFG, Bars, network, saved_states, train
from helpers.small import same

from kmine.data.batches import Batch, Views
from kmine.models.base import LocalModel
from kmine.training.fit import ConsistencyTarget


class Recording(LocalModel):
    """Records the arguments of feature dropout and the mode of the model, and drops nothing."""

    def __init__(self) -> None:
        super().__init__(network().net, 2, 1, "half")
        self.calls: list[tuple[list[bool] | None, float, bool]] = []

    def feature_dropout(self, images, rate):
        self.calls.append((None if images is None else images.tolist(), rate, self.training))
        return super().feature_dropout(None, rate)


def test_feature_dropout_is_for_pseudo_labeled_images_in_training_only():
    class Mixed(Bars):
        def __getitem__(self, step):
            return replace(super().__getitem__(step), pseudo=np.array([False, True, True, False]) & (step > 0))

    model = Recording()
    train(replace(CFG, steps=2, feature_perturbation=0.3), model=model, batches=Mixed())
    assert model.calls == [(None, 0.3, True), ([False, True, True, False], 0.3, True)]


class BarsWithViews(Bars):
    """`Bars` with two unlabeled images in each batch."""

    def __getitem__(self, step: int) -> Batch:
        other = super().__getitem__(step + 500).images[:2]
        valid = np.ones((2, 8, 8), bool)
        return replace(super().__getitem__(step), views=Views(other, other, valid, np.zeros((2, 8, 8), np.int64)))


def train_with_views(consistency_fn, cfg=CFG, **more):
    return train(cfg, batches=BarsWithViews(), consistency_fn=consistency_fn, **more)


def agree_with_average(net, views, step, ema):
    """Squared difference between the probabilities of the model and of its average."""
    with ema.applied():
        target = net(views.weak).softmax(1)
    return ConsistencyTarget(views.strong, lambda logits: (logits.softmax(1) - target).square().mean())


def test_the_teacher_is_the_running_average_of_the_weights_by_hand():
    """At step 0 it is the start. Step 0 keeps a tenth of it, step 1 two elevenths of the average."""
    model = network()
    own, teacher = [], []

    def consistency_fn(net, views, step, ema):
        assert not model.training and not torch.is_grad_enabled()
        own.append(model.net[0].weight.detach().clone())
        with ema.applied():
            teacher.append(model.net[0].weight.detach().clone())
        assert torch.equal(model.net[0].weight, own[-1])
        return ConsistencyTarget(views.strong, lambda logits: 0 * logits.sum())

    train_with_views(consistency_fn, replace(CFG, steps=3, ema_decay=0.99), model=model)
    assert torch.equal(teacher[0], own[0])
    once = own[0] / 10 + own[1] * 9 / 10
    torch.testing.assert_close(teacher[1], once)
    torch.testing.assert_close(teacher[2], once * 2 / 11 + own[2] * 9 / 11)


def test_a_training_with_a_teacher_resumed_anywhere_equals_an_uninterrupted_one():
    model, whole = train_with_views(agree_with_average, AVERAGED)
    states = saved_states(lambda **how: train_with_views(agree_with_average, AVERAGED, **how))
    assert len(states) == 5
    for state in states:
        resumed_model, resumed = train_with_views(agree_with_average, AVERAGED, resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert same(model.state_dict(), resumed_model.state_dict()) and whole.history == resumed.history
    assert not same(whole.final, train(AVERAGED)[1].final)


def test_unlabeled_images_pass_once_beside_the_labeled_ones_and_their_loss_is_added():
    shapes = []

    def consistency_fn(net, views, step, ema):
        assert ema is None
        perturbed = torch.tensor([False, True])
        return ConsistencyTarget(
            views.strong, lambda logits: shapes.append(logits.shape) or 0 * logits.sum(), perturbed, 0.4
        )

    def heavy(net, views, step, ema):
        return ConsistencyTarget(views.strong, lambda logits: 7 + 0 * logits.sum())

    one, model = replace(CFG, steps=1), Recording()
    _, result = train_with_views(consistency_fn, one, model=model)
    assert shapes == [(2, 2, 8, 8)] and model.calls == [([False] * 5 + [True], 0.4, True)]
    _, heavier = train_with_views(heavy, one)
    assert heavier.history[0][1] == pytest.approx(result.history[0][1] + 7, rel=1e-5), "the same random numbers"
