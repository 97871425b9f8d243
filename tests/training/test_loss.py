"""The segmentation loss by hand: ignored pixels, weights of images and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmine.training.loss import segmentation_loss


def logits_for(target: torch.Tensor, num_classes: int, margin: float) -> torch.Tensor:
    return (
        margin * torch.nn.functional.one_hot(target.clamp_max(num_classes - 1), num_classes).permute(0, 3, 1, 2).float()
    )


def test_loss_of_even_odds_by_hand():
    target = torch.tensor([[[1, 1], [0, 0]]])
    loss = segmentation_loss(torch.zeros(1, 2, 2, 2), target, torch.ones(1), dice_weight=1.0)
    assert loss.item() == pytest.approx(np.log(2) + 1 - 2 * 1 / (2 + 2), rel=1e-4)  # overlap 1, sums 2 and 2


def test_loss_ignores_255_and_weighs_images():
    target = torch.tensor([[[1, 0], [255, 255]], [[0, 1], [1, 0]]])
    right, wrong = logits_for(target, 2, 20.0), logits_for(1 - target.clamp_max(1), 2, 20.0)
    first_right = torch.stack([right[0], wrong[1]])
    weighted = segmentation_loss(first_right, target, torch.tensor([1.0, 0.0]), 1.0)
    assert weighted.item() == pytest.approx(0, abs=1e-4)
    assert segmentation_loss(first_right, target, torch.tensor([1.0, 1.0]), 1.0).item() > 5
    changed = right.clone()
    changed[0, :, 1, :] = torch.tensor([[50.0], [-50.0]])  # only ignored pixels
    assert torch.allclose(
        segmentation_loss(changed, target, torch.ones(2), 1.0), segmentation_loss(right, target, torch.ones(2), 1.0)
    )


def test_loss_with_every_pixel_ignored_is_zero_with_a_gradient():
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 2, 2), 255), torch.ones(1), 1.0)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_equal_pixel_weights_are_image_weights_and_weight_0_ignores_a_pixel():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[0, 0] = 255
    weights = torch.tensor([1.0, 0.3])
    spread = weights[:, None, None].expand(2, 4, 4)
    assert torch.equal(segmentation_loss(logits, target, weights, 1.0), segmentation_loss(logits, target, spread, 1.0))
    hidden = torch.where(torch.rand(2, 4, 4) < 0.5, 0.0, 1.0)
    dropped = torch.where(hidden > 0, target, 255)
    assert torch.allclose(
        segmentation_loss(logits, target, hidden, 1.0), segmentation_loss(logits, dropped, torch.ones(2), 1.0)
    ), "weight 0 equals ignore"


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_a_common_factor_of_the_weights_has_no_effect(factor):
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 8, 8), torch.randint(0, 2, (3, 8, 8))
    plain = segmentation_loss(logits, target, torch.ones(3), 1.0).item()
    assert segmentation_loss(logits, target, torch.full((3,), factor), 1.0).item() == pytest.approx(plain, rel=1e-4)


def test_a_batch_of_weight_0_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.ones(2, 4, 4, dtype=torch.long), torch.zeros(2), 1.0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_dice_of_each_image_by_hand():
    """Logits so sharp that soft Dice is Dice: one image half right (Dice 2/3), one right, one without the class."""
    target = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    logits = logits_for(torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 0, 0]]]), 2, 40.0)

    def dice_loss(weights, **how):
        weights = torch.tensor(weights)
        both, entropy = (segmentation_loss(logits, target, weights, w, **how).item() for w in (1.0, 0.0))
        return both - entropy

    assert dice_loss([1.0, 1.0, 1.0]) == pytest.approx((1 / 3 + 0) / 2, abs=1e-5)
    assert dice_loss([3.0, 1.0, 1.0]) == pytest.approx((3 * 1 / 3 + 0) / 4, abs=1e-5)
    assert dice_loss([1.0, 1.0, 1.0], by_image=False) == pytest.approx(1 - 2 * 2 / (3 + 4), abs=1e-5)


def test_classes_count_equally_however_many_images_show_them():
    target = torch.tensor([[[1, 1]], [[1, 2]]])
    logits = logits_for(torch.tensor([[[1, 1]], [[1, 1]]]), 3, 40.0)
    both, entropy = (segmentation_loss(logits, target, torch.ones(2), w).item() for w in (1.0, 0.0))
    assert both - entropy == pytest.approx(((0 + 1 / 3) / 2 + 1) / 2, abs=1e-5)
