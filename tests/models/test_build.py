"""The local models: shapes, scaling, weights files, and the loss by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.models.build import build_model
from kmine.training.loss import segmentation_loss

SMALL = {"encoder": "tu-mobilenetv3_small_050", "decoder_channels": 16}


def small(**settings: object) -> ModelConfig:
    return ModelConfig(**{**SMALL, **settings})


@pytest.mark.parametrize("name", ["unet", "unetpp", "sks"])
@pytest.mark.parametrize("sides", [(64, 64), (50, 71), (33, 96)])
def test_logits_have_the_image_s_own_sides_whatever_they_are(name, sides):
    model = build_model(small(name=name), 3, seed=0).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, 3, *sides, dtype=torch.uint8))
    assert logits.shape == (2, 3, *sides) and logits.dtype == torch.float32


def test_first_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (build_model(small(), 2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("scaling", "expected"), [("half", 0.0), ("imagenet", (127.5 - 123.675) / 58.395)])
def test_scaling_is_inside_the_model(scaling, expected):
    model = build_model(small(normalization=scaling), 2, seed=0)
    seen = []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(torch.full((1, 3, 32, 32), 127.5))
    assert seen[0][0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_a_local_weights_file_reaches_the_encoder(tmp_path):
    donor = build_model(small(), 2, seed=5)
    extra = {"classifier.weight": torch.zeros(3)}
    save_file(
        {k: v.contiguous() for k, v in donor.net.encoder.state_dict().items()} | extra, tmp_path / "e.safetensors"
    )
    model = build_model(small(encoder_weights=str(tmp_path / "e.safetensors")), 2, seed=0)
    own, given = model.net.encoder.state_dict(), donor.net.encoder.state_dict()
    assert all(torch.equal(own[k], given[k]) for k in own)
    head, donor_head = (m.net.segmentation_head.state_dict() for m in (model, donor))
    assert not all(torch.equal(head[k], donor_head[k]) for k in head)


def test_weights_of_another_architecture_are_refused_with_a_count(tmp_path):
    donor = build_model(small(), 2, seed=0).net.encoder.state_dict()
    save_file({k: v.contiguous() for k, v in donor.items()}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=r"not a checkpoint of encoder resnet18: \d+ of \d+ tensors missing"):
        build_model(ModelConfig(encoder="resnet18", encoder_weights=str(tmp_path / "e.safetensors")), 2, seed=0)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_damaged_or_missing_weights_are_one_clear_error(tmp_path, content):
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable"):
        build_model(small(encoder_weights=str(tmp_path / "e.safetensors")), 2, seed=0)
    with pytest.raises(UserError, match="no file"):
        build_model(small(encoder_weights=str(tmp_path / "none.safetensors")), 2, seed=0)


def test_unknown_names_suggest_the_nearest_and_offline_forbids_the_hub():
    with pytest.raises(UserError, match=r"did you mean mobilenet_v2\?"):
        build_model(ModelConfig(encoder="mobilnet_v2"), 2, seed=0)
    with pytest.raises(UserError, match="cannot be built"):
        build_model(ModelConfig(encoder="tu-no_such_net"), 2, seed=0)
    with pytest.raises(UserError, match="--offline forbids"):
        build_model(small(encoder_weights="hub"), 2, seed=0, offline=True)


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
    one_right = torch.stack([right[0], wrong[1]])
    silent = segmentation_loss(one_right, target, torch.tensor([1.0, 0.0]), 1.0)
    assert silent.item() == pytest.approx(0, abs=1e-4)
    assert segmentation_loss(one_right, target, torch.tensor([1.0, 1.0]), 1.0).item() > 5
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


def test_a_weight_a_pixel_is_a_weight_an_image_said_more_often():
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
    ), "a pixel of weight 0 is an ignored pixel"


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_one_weight_for_all_is_no_weight(factor):
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 8, 8), torch.randint(0, 2, (3, 8, 8))
    plain = segmentation_loss(logits, target, torch.ones(3), 1.0).item()
    assert segmentation_loss(logits, target, torch.full((3,), factor), 1.0).item() == pytest.approx(plain, rel=1e-4)


def test_a_batch_without_any_weight_teaches_nothing():
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.ones(2, 4, 4, dtype=torch.long), torch.zeros(2), 1.0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.fixture(params=["unet", "unetpp", "sks"])
def watched(request):
    """A model, and what its decoder got at the last call, the finest level first."""
    model = build_model(small(name=request.param), 2, seed=0)
    # BatchNorm would let one image of a batch speak to another before the decoder is reached.
    seen = []

    def watch():
        return model.net.decoder.register_forward_pre_hook(lambda _, args: seen.append([f.detach() for f in args[0]]))

    return model, seen, watch


IMAGES = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MINED = torch.tensor([False, True, False, True])


def features(watched, mined, rate, seed=1):
    model, seen, watch = watched
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(seed)
    with model.feature_dropout(mined, rate):
        handle = watch()
        model(IMAGES)
        handle.remove()
    model.load_state_dict(state)  # the running averages of batch norm
    return seen[-1]


def test_perturbed_features_lose_whole_channels_of_the_pseudo_labeled_images_alone(watched):
    watched[0].train()
    plain, dropped = features(watched, None, 0.5), features(watched, MINED, 0.5)
    lost = total = 0
    for before, after in zip(plain, dropped, strict=True):
        assert torch.equal(before[~MINED], after[~MINED])
        alive = after[MINED].abs().amax(dim=(2, 3)) > 0
        assert torch.equal(after[MINED], 2 * before[MINED] * alive[:, :, None, None]), (
            "whole channels, or twice as much"
        )
        could = before[MINED].abs().amax(dim=(2, 3)) > 0
        lost, total = lost + int((could & ~alive).sum()), total + int(could.sum())
    assert 0.4 < lost / total < 0.6


def test_perturbation_follows_the_seed_and_is_over_with_its_block(watched):
    model = watched[0].train()
    one, again, other = (features(watched, MINED, 0.3, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(RuntimeError), model.feature_dropout(MINED, 0.3):
        raise RuntimeError
    plain = features(watched, None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(plain, features(watched, MINED, 0.0), strict=True))
    model.eval()
    still, asked = features(watched, None, 0.3), features(watched, MINED, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(still, asked, strict=True)), "a model that predicts loses nothing"
