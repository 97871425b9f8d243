"""The fast image encoder computes what the official one computes."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import box_prompts, images, random_sam
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT

from kmine.segmenters.sam import fast_encoder
from kmine.segmenters.sam.fast_encoder import linear, use_fused_attention
from kmine.segmenters.sam.segmenter import SamSegmenter

CASES = {
    "windows without padding": {"img_size": 64, "window_size": 2},
    "windows with padding": {"img_size": 80, "window_size": 3},
    "windows wider than the image": {"img_size": 64, "window_size": 14},
    "global attention only": {"img_size": 96, "window_size": 0},
    "one token": {"img_size": 16, "window_size": 2},
    "no relative positions": {"img_size": 64, "window_size": 3, "use_rel_pos": False},
    "no bias of queries": {"img_size": 80, "window_size": 3, "qkv_bias": False},
}


def encoder(img_size: int, window_size: int, **options) -> ImageEncoderViT:
    """Shallow, with global attention in every other block; weights that start as zeros are drawn, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ImageEncoderViT(
            img_size=img_size,
            embed_dim=32,
            depth=4,
            num_heads=4,
            out_chans=16,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            window_size=window_size,
            global_attn_indexes=(1, 3),
            **{"use_rel_pos": True} | options,
        )
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                # Large ones: with nearly uniform attention an error would not show.
                parameter.add_(torch.randn_like(parameter), alpha=1.0 if "rel_pos" in name else 0.2)
    return made.eval()


def pixels(img_size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def differences(plain: ImageEncoderViT, batch: int) -> tuple[float, float]:
    """Largest differences from the official result: fast encoder, and official one without relative positions."""
    x, fast, blind = pixels(plain.img_size, batch), copy.deepcopy(plain), copy.deepcopy(plain)
    use_fused_attention(fast)
    for name, parameter in blind.named_parameters():
        if "rel_pos" in name:
            parameter.zero_()
    expected = plain(x)
    return tuple(float((expected - other(x)).abs().max()) for other in (fast, blind))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_encoder(case, batch) -> None:
    plain = encoder(**CASES[case])
    ours, blind = differences(plain, batch)
    assert ours < 1e-4
    # A single token attends to itself only.
    assert blind > 0.01 or case in ("one token", "no relative positions"), (
        "relative positions must matter, or the test shows nothing"
    )


@pytest.mark.parametrize("floats", [1, 3 * 25**2, 10**9])
def test_the_number_of_heads_at_once_does_not_matter(floats, monkeypatch) -> None:
    monkeypatch.setattr(fast_encoder, "CPU_MASK_FLOATS", floats)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **kwargs):
        calls.append(q.shape[1])
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    plain = encoder(80, 0)  # 25 tokens, 4 heads
    assert differences(plain, batch=2)[0] < 1e-4
    assert calls == 4 * {1: [1] * 8, 3 * 25**2: [3, 3, 2], 10**9: [8]}[floats]


def test_every_thread_gets_a_share_of_the_heads(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert fast_encoder._at_once(4096, "cpu") == 4  # 16 shares of 256 queries each
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert fast_encoder._at_once(4096, "cpu") == 1


def test_structure_and_weights_do_not_change_and_repeating_is_harmless() -> None:
    fast = encoder(80, 3)
    before, structure, x = copy.deepcopy(fast.state_dict()), str(fast), pixels(80)
    with torch.no_grad():
        use_fused_attention(fast)
        first = fast(x)
        use_fused_attention(fast)
        assert torch.equal(fast(x), first)
    assert str(fast) == structure
    assert all(torch.equal(before[key], value) for key, value in fast.state_dict().items())
    assert before.keys() == fast.state_dict().keys()


def test_a_copy_uses_its_own_weights() -> None:
    first = encoder(80, 3)
    use_fused_attention(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        before = first(pixels(80))
        second.blocks[0].attn.rel_pos_h.zero_()
        second.blocks[1].mlp.lin1.weight.zero_()
        assert torch.equal(first(pixels(80)), before)
        assert not torch.allclose(second(pixels(80)), before, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 3, 4, 5), (25, 14, 14, 5)])
def test_a_linear_layer_equals_the_convolution(shape) -> None:
    layer, x = torch.nn.Linear(5, 7), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), layer(x), atol=1e-5, rtol=0)
        assert linear(layer, x).is_contiguous()


def test_a_segmenter_gives_the_masks_of_the_official_model() -> None:
    plain, segmenter = random_sam(), SamSegmenter(random_sam(), name="s")
    (image,) = images(sizes=[(60, 150)])
    box = np.array([10, 12, 50, 40], np.float32)
    (embedding,) = segmenter.encode([image])
    predictor = SamPredictor(plain)
    predictor.set_image(image)
    assert type(plain.image_encoder.blocks[0].attn).forward == plain.image_encoder.blocks[0].attn.forward.__func__
    np.testing.assert_allclose(embedding.features, predictor.get_image_embedding()[0].numpy(), atol=1e-4)
    masks, _, low_res = predictor.predict(box=box, multimask_output=False)
    candidate = segmenter.decode([embedding], [box_prompts(box)])[0][0]
    np.testing.assert_allclose(candidate.low_res_logits, low_res, atol=1e-3)
    assert np.mean(candidate.masks != masks) < 2e-3
    assert 0 < masks.mean() < 1


@pytest.mark.slow
def test_equals_the_official_encoder_at_true_width_and_depth() -> None:
    sam = random_sam("sam_vit_b", image_size=256)
    with torch.no_grad():
        for name, parameter in sam.image_encoder.named_parameters():
            if "rel_pos" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        x, fast = pixels(256), copy.deepcopy(sam.image_encoder)
        use_fused_attention(fast)
        assert float((sam.image_encoder(x) - fast(x)).abs().max()) < 1e-4
