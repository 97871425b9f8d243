"""FixMatch by hand: confident pixels, mixed planes, both losses; and what it needs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.small import CFG, ChannelModel, views_of

from kmine.config import FixmatchConfig
from kmine.errors import UserError
from kmine.methods.fixmatch import apply_cutmix, fixmatch, fixmatch_consistency, masked_cross_entropy


def test_confident_valid_pixels_count_and_the_mean_is_over_all_valid_ones():
    logits = torch.tensor([[[[0.0, 0.0, 0.0, 0.0]], [[math.log(3), math.log(3), 0.0, 0.0]]]])  # p(1) = .75, .75, .5, .5
    classes = torch.tensor([[[1, 0, 1, 0]]])
    confident = torch.tensor([[[True, False, True, True]]])
    valid = torch.tensor([[[True, True, True, False]]])
    expected = (-math.log(0.75) - math.log(0.5)) / 3
    assert masked_cross_entropy(logits, classes, confident, valid).item() == pytest.approx(expected)
    assert masked_cross_entropy(logits, classes, confident, valid & False).item() == 0


def test_planes_are_mixed_like_the_strong_views():
    planes = torch.tensor([[[1, 2]], [[3, 4]]])
    assert apply_cutmix(planes, torch.tensor([[[0, 1]], [[-1, 0]]])).tolist() == [[[1, 4]], [[1, 2]]]


def test_the_weak_view_labels_both_views():
    """Pixel 0 is confidently 1, pixel 1 confidently 0, pixel 2 is not confident."""
    cfg = FixmatchConfig(weight=2.0, threshold=0.9, feature_perturbation=0.3)
    views = views_of([[[5, -5, 0]]], [[[1, 1, 1]]])
    target = fixmatch_consistency(cfg)(ChannelModel(), views, 0, None)
    assert target.images[:, 0].tolist() == [[[1, 1, 1]], [[5, -5, 0]]], "strong, then weak"
    assert target.perturbed.tolist() == [False, True] and target.rate == 0.3
    undecided = torch.zeros(2, 2, 1, 3)
    # Of each view two of three pixels count, with log 2 each; each view has half of the weight.
    assert target.loss(undecided).item() == pytest.approx(2.0 * (2 / 3) * math.log(2))


def test_without_a_confident_pixel_loss_and_gradient_are_zero():
    views = views_of([[[5, -5, 0]]], [[[1, 1, 1]]])
    target = fixmatch_consistency(FixmatchConfig(threshold=1.0))(ChannelModel(), views, 0, None)
    logits = torch.randn(2, 2, 1, 3, requires_grad=True)
    loss = target.loss(logits)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_a_rectangle_has_the_labels_of_the_image_that_it_came_from():
    views = views_of([[[9, 9]], [[-9, -9]]], [[[0, 0]], [[0, 0]]], source=[[[0, 1]], [[1, -1]]])
    target = fixmatch_consistency(FixmatchConfig())(ChannelModel(), views, 0, None)

    def loss(strong):
        logits = torch.zeros(4, 2, 1, 2)
        logits[:2, 1] = 30 * torch.tensor(strong, dtype=torch.float32)
        logits[2:, 1] = 30 * views.weak[:, 0].float()
        return target.loss(logits).item()

    assert loss([[[1, -1]], [[-1, 0]]]) == pytest.approx(0, abs=1e-6)
    assert loss([[[1, -1]], [[-1, 9]]]) == pytest.approx(0, abs=1e-6), "pixels outside the image do not count"
    assert loss([[[1, 1]], [[-1, 0]]]) == pytest.approx(30 / 3 / 2, rel=1e-4)


def test_two_views_need_augmentation(task_of):
    task, _ = task_of(replace(CFG, rounds=1, fit=replace(CFG.fit, augment=False)))
    with pytest.raises(UserError, match=r"fit\.augment"):
        fixmatch(task)
