"""UniMatch by hand: the teacher's targets, both strong views, the perturbed features; and what it needs."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.small import CFG, ChannelModel, views_of
from torch import Tensor

from kmine.config import UnimatchConfig
from kmine.errors import UserError
from kmine.methods.fixmatch import fixmatch_consistency
from kmine.methods.unimatch import unimatch
from kmine.training.fit import UnlabeledViews


class Opposite:
    """A running average whose weights are those of the model with the other sign."""

    def __init__(self, model: ChannelModel) -> None:
        self.model = model

    @contextmanager
    def applied(self):
        self.model.scale.data.neg_()
        yield
        self.model.scale.data.neg_()


def two_views(weak, first, second, source) -> UnlabeledViews:
    views = views_of(weak, first)
    both = torch.cat([views.strong, views_of(weak, second).strong])
    return replace(views, strong=both, source=torch.as_tensor(source))


def test_the_teachers_classes_label_both_strong_views_each_mixed_in_its_own_way() -> None:
    """The teacher sees class 1 in the second image alone; the second strong view of the first has a pixel of it."""
    model = ChannelModel()
    weak = [[[9, 9]], [[-9, -9]]]
    source = [[[0, 0]], [[1, 1]], [[0, 1]], [[1, -1]]]
    views = two_views(weak, [[[1, 2]], [[3, 4]]], [[[5, 6]], [[7, 8]]], source)
    target = fixmatch_consistency(UnimatchConfig(), has_teacher=True)(model, views, 0, Opposite(model))
    assert target.images[:, 0, 0].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 9], [-9, -9]]
    assert target.perturbed.tolist() == [False] * 4 + [True] * 2 and target.rate == 0.5
    assert model.scale.item() == 1, "the model has its own weights again"

    def loss(strong: list[list[int]], weak: Tensor = views.weak) -> float:
        logits = torch.zeros(6, 2, 1, 2)
        logits[:4, 1, 0] = 30 * torch.tensor(strong, dtype=torch.float32)
        logits[4:, 1] = -30 * weak[:, 0].float()
        return target.loss(logits).item()

    assert loss([[-1, -1], [1, 1], [-1, 1], [1, 0]]) == pytest.approx(0, abs=1e-6)
    assert loss([[-1, -1], [1, 1], [-1, -1], [1, 0]]) == pytest.approx(30 / 7 / 2, rel=1e-4), "one of seven pixels"
    assert loss([[-1, -1], [1, 1], [-1, 1], [1, 0]], -views.weak) == pytest.approx(270 / 2, rel=1e-4)


def test_strong_views_together_weigh_as_much_as_the_perturbed_features() -> None:
    model = ChannelModel()
    views = two_views([[[5, -5, 0]]], [[[1, 1, 1]]], [[[2, 2, 2]]], [[[0, 0, 0]]] * 2)
    target = fixmatch_consistency(UnimatchConfig(weight=2.0, threshold=0.9), has_teacher=True)(
        model, views, 0, Opposite(model)
    )
    assert target.loss(torch.zeros(3, 2, 1, 3)).item() == pytest.approx(2.0 * (2 / 3) * math.log(2))


def test_views_need_augmentation(task_of) -> None:
    task, _ = task_of(replace(CFG, rounds=1, fit=replace(CFG.fit, augment=False)))
    with pytest.raises(UserError, match=r"fit\.augment: expected true for unimatch"):
        unimatch(task)
