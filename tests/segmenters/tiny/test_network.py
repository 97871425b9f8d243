"""The network's input by hand, its gradients, and the ellipse of the untrained network."""

from __future__ import annotations

import pytest
import torch
from helpers.segmenter_suite import random_net

from kmine.segmenters.tiny.network import NUM_PLANES, NetworkInput, TinyNet, ellipse_logits, planes_of


def network_inputs(boxes, side: int = 96, **other) -> NetworkInput:
    count = len(boxes)
    fields = {
        "image": torch.full((count, 3, side, side), 90.0),
        "limits": torch.tensor([[-0.5, -0.5, side - 0.5, side - 0.5]] * count),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "points": torch.zeros(count, 0, 2),
        "point_labels": torch.zeros(count, 0, dtype=torch.long),
        "mask_input": torch.zeros(count, 1, side, side),
        "has_mask_input": torch.zeros(count),
    }
    return NetworkInput(**{**fields, **other})


def test_planes_by_hand() -> None:
    limits = torch.tensor([[-0.5, 9.5, 95.5, 95.5]])
    points, labels = torch.tensor([[[30.0, 40.0], [50.0, 60.0]]]), torch.tensor([[1, -1]])
    planes = planes_of(network_inputs([[20, 30, 60, 80]], limits=limits, points=points, point_labels=labels))[0]
    assert planes.shape == (NUM_PLANES, 96, 96)
    assert planes[:3].abs().max() == 0  # a flat crop has no contrast
    assert planes[3, 9].max() == 0
    assert planes[3, 10].min() == 1
    assert planes[4, 55, 40] > 0.99
    assert planes[4, 30, 40] == 0.5
    assert planes[5, 55, 40] == 1
    assert planes[5, 55, 20] == pytest.approx(0, abs=1e-6)
    assert planes[6, 40, 30] == 1
    assert planes[6, 60, 50] < 1e-3
    assert planes[7].max() == 0


def test_planes_do_not_depend_on_brightness_and_contrast() -> None:
    image = torch.rand(1, 3, 96, 96) * 100
    plain, brighter = (planes_of(network_inputs([[20, 30, 60, 80]], image=x)) for x in (image, 1.5 * image + 40))
    torch.testing.assert_close(plain, brighter, atol=1e-4, rtol=1e-4)


def test_every_weight_gets_a_gradient_and_scores_stay_in_range() -> None:
    net = random_net()
    inputs = network_inputs([[20, 30, 60, 80], [5, 5, 90, 90]], image=torch.rand(2, 3, 96, 96) * 255)
    added, score = net(planes_of(inputs))
    ((ellipse_logits(inputs.boxes, 96, 96) + added).sigmoid().mean() + score.mean()).backward()
    assert added.shape == (2, 1, 96, 96)
    assert ((score > 0) & (score < 1)).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert 0.8e6 < sum(p.numel() for p in net.parameters()) < 2.5e6
    with pytest.raises(ValueError, match="multiple of 16"):
        TinyNet(side=90)


def test_the_ellipse_by_hand() -> None:
    # Centre (2, 1), radii 2 and 1: 4 at the centre, 0 on the ellipse, 4 (1 - 2) one radius outside, at least -8.
    logits = ellipse_logits(torch.tensor([[0.0, 0, 4, 2]]), 6, 9)[0, 0]
    assert (logits[1, 2], logits[1, 4], logits[1, 6], logits[5, 8]) == (4, 0, -4, -8)
