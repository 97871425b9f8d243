"""SKS: starts as its fine branch, fuses by one rule, does not change a frozen classifier."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import timm
import torch
from helpers.models import scramble, small_sks
from helpers.small import same
from torch import nn

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.models.build import build_model
from kmine.models.sks import CoarseBranch, Decoder, Fusion, SksModel

SWITCHES = ("skip_feature_share", "skip_resolution", "skip_coarse")
ALL_OFF = dict.fromkeys(SWITCHES, False)
COMBINATIONS = [dict(zip(SWITCHES, on, strict=True)) for on in product((False, True), repeat=3)]


def sks(seed: int = 0, **settings: object) -> SksModel:
    return build_model(small_sks(**settings), 3, seed)


def images(*sides: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# -- the fusion


def test_fusion_is_a_biased_1x1_convolution_of_the_concatenation():
    fusion = Fusion(3)
    scramble(fusion)
    coarse, fine = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    by_hand = torch.zeros(2, 3, 4, 5)
    for row, column in product(range(4), range(5)):
        both = torch.cat([coarse[..., row, column], fine[..., row, column]], dim=1)
        by_hand[..., row, column] = both @ fusion.weight[:, :, 0, 0].T + fusion.bias
    assert torch.allclose(fusion(coarse, fine), by_hand, atol=1e-6)
    assert count(fusion) == 2 * 3 * 3 + 3


def test_a_new_fusion_returns_the_fine_features():
    coarse, fine = 1e3 * torch.randn(2, 40, 6, 6), torch.randn(2, 40, 6, 6)
    assert torch.equal(Fusion(40)(coarse, fine), fine)


# -- the network


@pytest.mark.parametrize(("encoder", "levels"), [("mobilenetv3_small_050", 4), ("resnet10t", 3), ("convnext_atto", 3)])
@pytest.mark.parametrize("training", [False, True])
def test_initially_it_equals_its_fine_branch_without_skips(encoder, levels, training):
    full, fine_only = (sks(encoder=encoder, levels=levels, **switches) for switches in ({}, ALL_OFF))
    assert full.uses_classifier and not fine_only.uses_classifier
    fine_only.net.fine.load_state_dict(full.net.fine.state_dict())
    fine_only.net.decoder.load_state_dict(full.net.decoder.state_dict())
    x = images(64, 64)
    assert torch.equal(full.train(training)(x), fine_only.train(training)(x))


def test_with_every_skip_off_it_is_a_u_net_on_timm_s_own_features():
    model = sks(levels=4, **ALL_OFF).eval()
    with torch.random.fork_rng():
        encoder = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    encoder.load_state_dict(flat_names(model.net.fine, encoder))
    x = images(64, 96)
    features = encoder(x / 127.5 - 1)
    decoder = Decoder(encoder.feature_info.reduction(), encoder.feature_info.channels(), [16, 8, 8, 8, 8], 3).eval()
    decoder.load_state_dict(model.net.decoder.state_dict())
    assert torch.allclose(model(x), decoder(features), atol=1e-5)


def flat_names(pyramid: nn.Module, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of `encoder` with the tensors of `pyramid`: both have the same ones in the same order."""
    return dict(zip(encoder.state_dict(), pyramid.state_dict().values(), strict=True))


@pytest.mark.parametrize("switches", COMBINATIONS)
def test_each_combination_of_skips_by_hand(switches):
    net = sks(levels=3, **switches).eval().net
    scramble(net.fusions), scramble(net.coarse_fusions)
    share, resolution, third = switches.values()
    x = torch.randn(1, 3, 48, 32)
    coarse = net.coarse.pyramid(x)
    to_decoder, output = [], x
    for n, stage in enumerate(net.fine.stages):
        own = stage(output)
        level = n >= 1  # features at stride 2 are not fused
        fused = net.fusions[str(n)](coarse[n], own) if level and (resolution or (share and n < 3)) else own
        output = fused if share else own
        skip = fused if resolution else own
        to_decoder.append(net.coarse_fusions[str(n)](coarse[n], skip) if level and third else skip)
    assert torch.equal(net(x), net.decoder(to_decoder))


def test_combinations_of_skips_differ_except_for_one_equivalent_pair():
    logits = {}
    for switches in COMBINATIONS:
        model = sks(**switches).eval()
        scramble(model.net.fusions), scramble(model.net.coarse_fusions)
        logits[tuple(switches.values())] = model(images(32, 32))
    equal = [{a, b} for a, b in combinations(logits, 2) if torch.equal(logits[a], logits[b])]
    assert equal == [{(False, True, False), (False, False, True)}], "both fuse the features of the decoder only"


@pytest.mark.parametrize("switches", COMBINATIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_every_trainable_weight_that_is_used_gets_a_gradient(switches, frozen):
    model = sks(freeze_coarse=frozen, **switches).train()
    model(images(32, 32)).sum().backward()
    without_gradient = {n for n, w in model.named_parameters() if w.requires_grad and w.grad is None}
    if frozen:
        assert without_gradient == set()
    elif model.uses_classifier:
        unused = ("net.coarse.head.", *(f"net.coarse.pyramid.stages.{n}." for n in range(model.net.depth, 9)))
        assert without_gradient == {n for n, _ in model.named_parameters() if n.startswith(unused)}
    else:
        assert all(name.startswith("net.coarse.") for name in without_gradient)


@pytest.mark.parametrize("switches", COMBINATIONS)
def test_parameter_counts_by_hand(switches):
    net = sks(levels=4, **switches).net
    channels = net.fine.channels
    assert channels == (16, 8, 16, 24, 288) and net.fine.strides == (2, 4, 8, 16, 32)
    sizes = [2 * c * c + c for c in channels[1:]]
    share, resolution, third = switches.values()
    first = sum(sizes) if resolution else sum(sizes[:-1]) if share else 0
    assert (count(net.fusions), count(net.coarse_fusions)) == (first, sum(sizes) if third else 0)
    assert count(net.coarse) == count(net.fine) + 288 + 1
    assert count(net) == 2 * count(net.fine) + 289 + first + count(net.coarse_fusions) + count(net.decoder)


def test_three_levels_drop_the_deepest_stages():
    three, four = sks(levels=3), sks(levels=4)
    assert three.net.fine.strides == (2, 4, 8, 16) and (three.stride, four.stride) == (16, 32)
    assert count(three.net.fine) < 0.5 * count(four.net.fine)


@pytest.mark.parametrize("sides", [(64, 64), (50, 71), (33, 96), (7, 100)])
@pytest.mark.parametrize("levels", [3, 4])
def test_images_may_have_any_size(sides, levels):
    model = sks(levels=levels).eval()
    with torch.inference_mode():
        logits, label, cam = (predict(images(*sides)) for predict in (model, model.classifier, model.activation_map))
    assert logits.shape == (2, 3, *sides) and logits.dtype == torch.float32
    assert label.shape == (2,)
    assert cam.shape == (2, *sides) and cam.min() >= 0 and cam.max() <= 1


def test_initial_weights_follow_the_seed_and_differ_between_the_branches():
    a, b, c = (sks(seed).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)
    assert not torch.equal(a["net.fine.stages.0.parts.0.weight"], a["net.coarse.pyramid.stages.0.parts.0.weight"])


# -- the frozen branch


def test_a_frozen_coarse_branch_gets_no_gradient_and_no_statistics():
    model = sks()
    scramble(model.net.fusions)
    before = {k: v.clone() for k, v in model.net.coarse.state_dict().items()}
    model.train()
    assert model.net.fine.training and not any(m.training for m in model.net.coarse.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(images(32, 32)).square().mean().backward()
        assert all(w.grad is None for w in model.net.coarse.parameters())
        optimizer.step()
    after = model.net.coarse.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m.training for m in model.eval().modules())


def test_an_unfrozen_coarse_branch_gets_a_gradient_from_the_second_step_on():
    model = sks(freeze_coarse=False).train()
    assert all(m.training for m in model.net.coarse.modules())
    stem = model.net.coarse.pyramid.stages[0].parts[0].weight
    model(images(32, 32)).square().mean().backward()
    assert not stem.grad.any(), "a new fusion ignores coarse features"
    scramble(model.net.fusions)
    model(images(32, 32)).square().mean().backward()
    assert stem.grad.any()


def test_unfrozen_is_for_the_block_only():
    model = sks().train()
    with model.unfrozen() as classifier:
        classifier.train()(images(32, 32)).sum().backward()
        assert all(w.grad is not None for w in classifier.parameters())
    assert not any(w.requires_grad for w in model.net.coarse.parameters())
    assert not any(m.training for m in model.net.coarse.modules()) and model.net.fine.training
    trainable = sks(freeze_coarse=False)
    with trainable.unfrozen():
        pass
    assert all(w.requires_grad for w in trainable.net.coarse.parameters())


# -- predictions of the classifier


class Channels(nn.Module):
    """A pyramid whose features are the three channels of the image."""

    channels = (3,)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def test_activation_and_logit_by_hand():
    branch = CoarseBranch(Channels())
    branch.head.weight.data = torch.tensor([[1.0, -2.0, 0.5]])
    branch.head.bias.data = torch.tensor([0.25])
    x = torch.tensor([[[4.0, 0.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [2.0, 2.0]]])[None]
    # Pixels: 4, -2 + 1, 2 - 2 + 1, 1 + 1; negative ones are set to 0, then all are divided by 4.
    assert torch.allclose(branch.activation(x), torch.tensor([[[1.0, 0.0], [0.25, 0.5]]]))
    assert branch(x).item() == pytest.approx((4 - 1 + 1 + 2) / 4 + 0.25)
    branch.head.weight.data = -branch.head.weight.data.abs()
    assert torch.equal(branch.activation(x), torch.zeros(1, 2, 2)), "without positive evidence the map is 0"


def test_the_activation_map_is_aligned_with_the_image_and_scaled_per_image():
    model = sks(levels=3).eval()
    model.net.coarse.pyramid = Shrink()
    model.net.coarse.head = nn.Linear(1, 1)
    model.net.coarse.head.weight.data.fill_(1.0)
    x = torch.full((2, 3, 64, 48), 127.5)
    x[0, :, 16:32, 0:16] = 255
    x[1, :, 48:64, 32:48] = 150
    cam = model.activation_map(x)
    assert cam.shape == (2, 64, 48) and not cam.requires_grad
    assert cam[0, 24, 8] > 0.9 and cam[1, 56, 40] > 0.9
    assert cam[0, 56, 40] == 0 and cam[1, 8, 8] == 0


class Shrink(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(x, 16).mean(dim=1, keepdim=True)]


def test_classifier_and_model_share_their_weights():
    model = sks().eval()
    scrambled = {k: v + 0.1 for k, v in model.classifier.state_dict().items() if v.is_floating_point()}
    model.classifier.load_state_dict(scrambled, strict=False)
    state = model.net.coarse.state_dict()
    assert all(torch.equal(v, state[k.removeprefix("coarse.")]) for k, v in scrambled.items())


# -- caching of coarse features


def counted(model: SksModel) -> list[int]:
    """Images that passed the coarse branch, call by call."""
    calls: list[int] = []
    model.net.coarse.pyramid.stages[0].register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    return calls


def test_with_caching_an_image_passes_the_frozen_branch_once_with_the_same_result():
    model, x = sks(), images(64, 64, count=3)
    scramble(model.net.fusions)
    plain = model.eval()(x)
    calls = counted(model)
    with model.caching_features(augmented=False):
        first = model.eval()(x)
        again = model.train()(x.flip(0))
        assert sum(calls) == 3
        again.sum().backward()
    assert torch.allclose(first, plain, atol=1e-4)
    assert model.net.fine.stages[0].parts[0].weight.grad is not None
    model.eval()(x)
    assert sum(calls) == 6, "nothing is cached outside the block"


def test_with_augmentation_only_images_in_eval_mode_are_cached():
    model, x = sks(), images(64, 64)
    calls = counted(model)
    with model.caching_features(augmented=True):
        for _ in range(2):
            model.train()(x)
        assert calls == [2, 2]
        for _ in range(2):
            with torch.inference_mode():
                model.eval()(x)
        assert sum(calls) == 6


def test_features_cached_in_inference_mode_can_be_used_in_training():
    model, x = sks(), images(64, 64)
    with model.caching_features(augmented=False):
        with torch.inference_mode():
            model.eval()(x)
        model.train()(x).square().sum().backward()
    gradient = model.net.fusions["1"].weight.grad  # its input are the cached features
    assert gradient.isfinite().all() and gradient.any()


def test_an_unfrozen_branch_is_not_cached():
    model, x = sks(freeze_coarse=False), images(64, 64)
    calls = counted(model)
    with model.caching_features(augmented=False):
        model(x), model(x)
    assert calls == [2, 2]


def test_a_full_cache_takes_no_further_images(monkeypatch):
    monkeypatch.setattr("kmine.models.sks.FEATURE_CACHE_BYTES", 0)
    model, x = sks(), images(64, 64)
    calls = counted(model)
    with model.caching_features(augmented=False):
        a, b = model.eval()(x), model.eval()(x)
        assert not model.net.feature_cache.entries
    assert calls == [1, 1, 1, 1] and torch.equal(a, b)


# -- names and weights


def test_the_default_encoder_is_the_paper_s_and_the_prefix_tu_is_optional():
    assert ModelConfig(name="sks").resolved().encoder == "swinv2_tiny_window8_256"
    a, b = (sks(encoder=name).state_dict() for name in ("mobilenetv3_small_050", "tu-mobilenetv3_small_050"))
    assert same(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "mobilenet_v2"}, r"timm has no 'mobilenet_v2'; did you mean mobilenetv2_\d+\?"),
        ({"encoder": "hrnet_w18_small"}, r"cannot be run stage by stage \(HighResolutionNetFeatures\)"),
        ({"encoder": "vit_tiny_patch16_224"}, "cannot be run stage by stage .* encoders that can: swinv2_tiny"),
        ({"encoder": "maxvit_nano_rw_256"}, "does not take an image of 64 x 64"),
        ({"encoder_weights": "no.safetensors"}, "no file no.safetensors"),
    ],
)
def test_unsuitable_encoders_are_refused_with_suitable_ones_named(settings, message):
    with pytest.raises(UserError, match=message):
        sks(**settings)


def test_offline_forbids_the_hub():
    with pytest.raises(UserError, match="--offline forbids"):
        build_model(small_sks(encoder_weights="hub"), 2, 0, offline=True)


# -- the veto


def with_veto(model: SksModel, threshold: float) -> SksModel:
    model.net.veto.copy_(torch.tensor([1.0, 0.0, threshold]))
    return model


def test_an_image_with_a_probability_below_the_threshold_has_no_lesion_in_eval_mode():
    model = sks(veto=True)
    x = images(64, 64, count=4)
    plain, probs = model.eval()(x), model.classifier.eval()(x).sigmoid()
    threshold = float(probs.sort().values[1:3].mean())
    vetoed = with_veto(model, threshold)(x)
    below = probs < threshold
    assert below.sum() == 2 and torch.equal(vetoed[~below], plain[~below])
    assert torch.equal(vetoed[:, :-1], plain[:, :-1]) and not (vetoed[below].argmax(dim=1) == 2).any()


def test_the_veto_takes_no_part_in_training():
    with_it, without = with_veto(sks(veto=True), 1.0), sks(veto=False)
    x = images(64, 64)
    assert torch.equal(with_it.train()(x), without.train()(x))
    assert with_it.state_dict().keys() - without.state_dict().keys() == {"net.veto"}


def test_a_fine_branch_alone_can_have_a_veto():
    model = sks(veto=True, **ALL_OFF)
    assert model.uses_classifier and model.net.depth == len(model.net.fine.strides)
    assert (with_veto(model, 1.0).eval()(images(32, 32)).argmax(dim=1) < 2).all()


@pytest.mark.parametrize("switches", [{}, {"skip_resolution": False, "skip_coarse": False}, ALL_OFF])
def test_cached_features_give_the_same_veto(switches):
    model = with_veto(sks(veto=True, **switches), 0.5).eval()
    x = images(32, 32)
    expected = model(x)
    with model.caching_features(augmented=True):
        assert torch.equal(model(x), model(x)) and torch.allclose(model(x), expected, atol=1e-5)
