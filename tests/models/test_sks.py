"""SKS: it begins as its fine branch alone, fuses by one rule, and leaves a frozen classifier alone."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.models.build import build_model
from kmine.models.sks import (
    CoarseBranch,
    Decoder,
    Fusion,
    SksModel,
    SksNet,
    build_sks,
)

SWITCHES = ("skip_feature_share", "skip_resolution", "skip_coarse")
ALL_OFF = dict.fromkeys(SWITCHES, False)
ALL_SWITCHINGS = [dict(zip(SWITCHES, on, strict=True)) for on in product((False, True), repeat=3)]


def config(**settings: object) -> ModelConfig:
    base = {"name": "sks", "encoder": "mobilenetv3_small_050", "decoder_channels": 16, "levels": 3}
    return ModelConfig(**{**base, **settings})


def sks(seed: int = 0, **settings: object) -> SksModel:
    return build_model(config(**settings), 3, seed)


def images(*sides: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def scramble(module: nn.Module) -> None:
    """Weights away from their start, so that nothing is equal by being zero or one."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)


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


def test_a_new_fusion_passes_the_fine_features_on():
    coarse, fine = 1e3 * torch.randn(2, 40, 6, 6), torch.randn(2, 40, 6, 6)
    assert torch.equal(Fusion(40)(coarse, fine), fine)


# -- the network


@pytest.mark.parametrize(("encoder", "levels"), [("mobilenetv3_small_050", 4), ("resnet10t", 3), ("convnext_atto", 3)])
@pytest.mark.parametrize("training", [False, True])
def test_at_step_0_it_equals_its_fine_branch_alone(encoder, levels, training):
    guided, alone = (sks(encoder=encoder, levels=levels, **switches) for switches in ({}, ALL_OFF))
    assert guided.uses_classifier and not alone.uses_classifier
    alone.net.fine.load_state_dict(guided.net.fine.state_dict())
    alone.net.decoder.load_state_dict(guided.net.decoder.state_dict())
    x = images(64, 64)
    assert torch.equal(guided.train(training)(x), alone.train(training)(x))


def test_with_every_skip_off_it_is_a_u_net_on_timm_s_own_features():
    model = sks(levels=4, **ALL_OFF).eval()
    with torch.random.fork_rng():
        encoder = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    encoder.load_state_dict(flat_names(model.net.fine, encoder))
    x = images(64, 96)
    features = encoder(x / 127.5 - 1)
    decoder = Decoder(encoder.feature_info.reduction(), encoder.feature_info.channels(), 16, 3).eval()
    decoder.load_state_dict(model.net.decoder.state_dict())
    assert torch.allclose(model(x), decoder(features), atol=1e-5)


def flat_names(pyramid: nn.Module, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Both hold the same tensors in the same order."""
    return dict(zip(encoder.state_dict(), pyramid.state_dict().values(), strict=True))


@pytest.mark.parametrize("switches", ALL_SWITCHINGS)
def test_each_skip_does_what_it_says(switches):
    net = sks(levels=3, **switches).eval().net
    scramble(net.fusions), scramble(net.coarse_fusions)
    share, resolution, third = switches.values()
    x = torch.randn(1, 3, 48, 32)
    coarse = net.coarse.pyramid(x)
    to_decoder, flow = [], x
    for n, stage in enumerate(net.fine.stages):
        own = stage(flow)
        level = n >= 1  # the stem's features at stride 2 belong to no level
        fused = net.fusions[str(n)](coarse[n], own) if level and (resolution or (share and n < 3)) else own
        flow = fused if share else own
        skip = fused if resolution else own
        to_decoder.append(net.coarse_fusions[str(n)](coarse[n], skip) if level and third else skip)
    assert torch.equal(net(x), net.decoder(to_decoder))


def test_switchings_differ_but_for_one_pair_that_is_the_same_network():
    answers = {}
    for switches in ALL_SWITCHINGS:
        model = sks(**switches).eval()
        scramble(model.net.fusions), scramble(model.net.coarse_fusions)
        answers[tuple(switches.values())] = model(images(32, 32))
    same = [{a, b} for a, b in combinations(answers, 2) if torch.equal(answers[a], answers[b])]
    assert same == [{(False, True, False), (False, False, True)}], "the decoder's fused features, by either name"


@pytest.mark.parametrize("switches", ALL_SWITCHINGS)
@pytest.mark.parametrize("frozen", [True, False])
def test_every_weight_that_may_learn_is_reached(switches, frozen):
    model = sks(freeze_coarse=frozen, **switches).train()
    model(images(32, 32)).sum().backward()
    silent = {n for n, w in model.named_parameters() if w.requires_grad and w.grad is None}
    if frozen:
        assert silent == set()
    elif model.uses_classifier:
        unread = ("net.coarse.head.", *(f"net.coarse.pyramid.stages.{n}." for n in range(model.net.depth, 9)))
        assert silent == {n for n, _ in model.named_parameters() if n.startswith(unread)}
    else:
        assert all(name.startswith("net.coarse.") for name in silent)


@pytest.mark.parametrize("switches", ALL_SWITCHINGS)
def test_parameters_add_up(switches):
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
def test_any_size_goes_in_and_comes_out(sides, levels):
    model = sks(levels=levels).eval()
    with torch.inference_mode():
        logits, label, cam = (do(images(*sides)) for do in (model, model.classify, model.activation_map))
    assert logits.shape == (2, 3, *sides) and logits.dtype == torch.float32
    assert label.shape == (2,)
    assert cam.shape == (2, *sides) and cam.min() >= 0 and cam.max() <= 1


def test_first_weights_come_from_the_seed_and_the_branches_differ():
    a, b, c = (sks(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
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


def test_a_free_coarse_branch_learns_from_the_second_step_on():
    model = sks(freeze_coarse=False).train()
    assert all(m.training for m in model.net.coarse.modules())
    stem = model.net.coarse.pyramid.stages[0].parts[0].weight
    model(images(32, 32)).square().mean().backward()
    assert not stem.grad.any(), "the fusions start blind to it"
    scramble(model.net.fusions)
    model(images(32, 32)).square().mean().backward()
    assert stem.grad.any()


def test_thawed_it_may_learn_and_is_frozen_again_afterwards():
    model = sks().train()
    with model.unfrozen() as classifier:
        classifier.train()(images(32, 32)).sum().backward()
        assert all(w.grad is not None for w in classifier.parameters())
    assert not any(w.requires_grad for w in model.net.coarse.parameters())
    assert not any(m.training for m in model.net.coarse.modules()) and model.net.fine.training
    free = sks(freeze_coarse=False)
    with free.unfrozen():
        pass
    assert all(w.requires_grad for w in free.net.coarse.parameters())


# -- the classifier's answers


class Given(nn.Module):
    """A pyramid whose features are the image's own channels, three of them."""

    channels = (3,)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def test_activation_and_logit_by_hand():
    branch = CoarseBranch(Given())
    branch.head.weight.data = torch.tensor([[1.0, -2.0, 0.5]])
    branch.head.bias.data = torch.tensor([0.25])
    x = torch.tensor([[[4.0, 0.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [2.0, 2.0]]])[None]
    # places: 4, -2 + 1, 2 - 2 + 1, 1 + 1; what is below 0 is cut, then all divided by 4
    assert torch.allclose(branch.activation(x), torch.tensor([[[1.0, 0.0], [0.25, 0.5]]]))
    assert branch(x).item() == pytest.approx((4 - 1 + 1 + 2) / 4 + 0.25)
    branch.head.weight.data = -branch.head.weight.data.abs()
    assert torch.equal(branch.activation(x), torch.zeros(1, 2, 2)), "no evidence, no map"


def test_the_map_lies_where_the_image_is_and_is_scaled_image_by_image():
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
    x = images(40, 40)
    assert torch.equal(model.classify(x), model.classifier(x))
    scrambled = {k: v + 0.1 for k, v in model.classifier.state_dict().items() if v.is_floating_point()}
    model.classifier.load_state_dict(scrambled, strict=False)
    state = model.net.coarse.state_dict()
    assert all(torch.equal(v, state[k.removeprefix("coarse.")]) for k, v in scrambled.items())


# -- coarse features once an image


def counted(model: SksModel) -> list[int]:
    """Images that passed the coarse branch, call by call."""
    calls: list[int] = []
    model.net.coarse.pyramid.stages[0].register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    return calls


def test_the_frozen_branch_sees_an_image_once_while_remembering_and_says_the_same():
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
    assert sum(calls) == 6, "outside the block nothing is remembered"


def test_augmented_training_images_are_not_remembered_those_of_validation_are():
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


def test_features_made_in_inference_mode_serve_in_training():
    model, x = sks(), images(64, 64)
    with model.caching_features(augmented=False):
        with torch.inference_mode():
            model.eval()(x)
        model.train()(x).sum().backward()


def test_a_branch_that_learns_is_never_remembered():
    model, x = sks(freeze_coarse=False), images(64, 64)
    calls = counted(model)
    with model.caching_features(augmented=False):
        model(x), model(x)
    assert calls == [2, 2]


def test_when_the_memory_is_full_nothing_more_is_kept(monkeypatch):
    monkeypatch.setattr("kmine.models.sks.FEATURE_CACHE_BYTES", 0)
    model, x = sks(), images(64, 64)
    calls = counted(model)
    with model.caching_features(augmented=False):
        a, b = model.eval()(x), model.eval()(x)
        assert not model.net.feature_cache.entries
    assert calls == [1, 1, 1, 1] and torch.equal(a, b)


# -- names and weights


def test_the_default_encoder_is_the_paper_s_and_may_be_named_with_or_without_tu():
    assert ModelConfig(name="sks").resolved().encoder == "swinv2_tiny_window8_256"
    a, b = (sks(encoder=name).state_dict() for name in ("mobilenetv3_small_050", "tu-mobilenetv3_small_050"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encoder": "mobilenet_v2"}, r"timm has no 'mobilenet_v2'; did you mean mobilenetv2_\d+\?"),
        ({"encoder": "hrnet_w18_small"}, r"cannot be run stage by stage \(HighResolutionNetFeatures\)"),
        ({"encoder": "vit_tiny_patch16_224"}, "cannot be run stage by stage .* encoders that can: swinv2_tiny"),
        ({"encoder": "maxvit_nano_rw_256"}, "does not take an image of 64 x 64"),
        ({"encoder_weights": "no.safetensors"}, "no file no.safetensors"),
    ],
)
def test_encoders_that_do_not_serve_are_refused_with_some_that_do(settings, said):
    with pytest.raises(UserError, match=said):
        sks(**settings)


def test_offline_forbids_the_hub():
    with pytest.raises(UserError, match="--offline forbids"):
        build_model(config(encoder_weights="hub"), 2, 0, offline=True)


def test_a_weights_file_reaches_both_encoders_and_nothing_else(tmp_path):
    donor = timm.create_model("mobilenetv3_small_050")
    scramble(donor)
    save_file(donor.state_dict(), tmp_path / "e.safetensors")
    loaded, plain = sks(encoder_weights=str(tmp_path / "e.safetensors")), sks()
    for pyramid in (loaded.net.fine, loaded.net.coarse.pyramid):
        assert torch.equal(pyramid.stages[0].parts[0].weight, donor.conv_stem.weight)
        assert torch.equal(pyramid.stages[2].parts[0][0].conv_dw.weight, donor.blocks[1][0].conv_dw.weight)
    assert torch.equal(loaded.net.decoder.head.weight, plain.net.decoder.head.weight)


def test_torchvision_s_mobilenet_v2_serves_timm_s(tmp_path):
    donor = build_model(ModelConfig(encoder_depth=5, decoder_channels=8), 2, seed=3).eval().net.encoder
    save_file({k: v.contiguous() for k, v in donor.state_dict().items()}, tmp_path / "e.safetensors")
    model = sks(encoder="mobilenetv2_100", levels=4, encoder_weights=str(tmp_path / "e.safetensors")).eval()
    x = torch.randn(1, 3, 32, 32)
    given = {f.shape[-1]: f for f in donor(x)}
    for feature in model.net.fine(x)[:-1]:  # torchvision's deepest are those of its classifier
        assert torch.allclose(feature, given[feature.shape[-1]], atol=1e-5)


def test_build_sks_is_reached_through_the_registry():
    with torch.random.fork_rng():
        net = build_sks(config(), 2).net
    assert isinstance(net, SksNet) and isinstance(sks(), SksModel)
