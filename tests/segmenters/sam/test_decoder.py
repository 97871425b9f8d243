"""Frames of boxes, points and mask inputs, by hand; the state of a mask decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import box_prompts, images, random_sam, record_prompts

from kmine.segmenters.base import MASK_INPUT_CLIP, Embedding
from kmine.segmenters.sam.decoder import PromptDecoder
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts


@pytest.fixture(scope="module")
def small():
    return random_sam()


@pytest.fixture
def spy(small, monkeypatch):
    return record_prompts(small, monkeypatch)


def test_boxes_and_points_reach_the_prompt_encoder_in_its_frame(small, spy) -> None:
    segmenter = SamSegmenter(small, name="s")
    wide = Embedding((100, 200), np.zeros((256, 16, 16), np.float32))  # 256 / 200 = 1.28
    tall = Embedding((400, 100), np.zeros((256, 16, 16), np.float32))  # 256 / 400 = 0.64
    point = {"point_coords": np.array([[50, 25]], np.float32), "point_labels": np.array([1])}
    jitter = np.array([[20, 20, 100, 50]], np.float32)
    prompts = Prompts(1, np.array([10, 20, 110, 60], np.float32), **point, jittered_boxes=jitter)
    segmenter.decode([wide, tall], [[prompts], box_prompts((10, 20, 50, 200))])
    first, second = spy
    torch.testing.assert_close(
        first["boxes"], torch.tensor([[12.8, 25.6, 140.8, 76.8], [25.6, 25.6, 128.0, 64.0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(first["points"][0], torch.tensor([[[64.0, 32.0]]] * 2))
    assert first["points"][1].tolist() == [[1], [1]]
    torch.testing.assert_close(second["boxes"], torch.tensor([[6.4, 12.8, 32.0, 128.0]]), atol=1e-4, rtol=0)
    assert second["points"] is None
    assert second["masks"] is None


def test_a_mask_input_is_clipped_resized_and_padded_with_background(small, spy) -> None:
    mask_input = np.full((100, 200), 3, np.float32)
    mask_input[:, 100:] = 50
    segmenter = SamSegmenter(small, name="s")
    embedding = Embedding((100, 200), np.zeros((256, 16, 16), np.float32))
    jitter = np.array([[20, 20, 100, 50]], np.float32)
    prompts = Prompts(1, np.array([10, 20, 110, 60], np.float32), mask_input=mask_input, jittered_boxes=jitter)
    segmenter.decode([embedding], [[prompts]])
    masks = spy[0]["masks"]
    assert masks.shape == (2, 1, 64, 64)  # a quarter of 256; the jittered box has the mask input, too
    assert torch.equal(masks[0], masks[1])
    padded = masks[0, 0]
    torch.testing.assert_close(padded[:32, :30], torch.full((32, 30), 3.0))  # 100 rows of 200 become 32 of 64
    torch.testing.assert_close(padded[:32, 34:], torch.full((32, 30), MASK_INPUT_CLIP))
    assert (padded[32:] == -MASK_INPUT_CLIP).all()


def test_a_mask_input_of_an_extremely_long_image_keeps_one_row(small) -> None:
    assert PromptDecoder(small, "s").mask_input(np.zeros((1, 1000), np.float32)).shape == (1, 64, 64)


def test_float16_features_are_read(small) -> None:
    segmenter = SamSegmenter(small, name="s")
    (embedding,) = segmenter.encode(images(sizes=[(60, 150)]))
    half = Embedding(embedding.size, embedding.features.astype(np.float16))
    full, rounded = (segmenter.decode([e], [box_prompts((3, 4, 90, 55))])[0][0] for e in (embedding, half))
    np.testing.assert_allclose(full.low_res_logits, rounded.low_res_logits, atol=0.05)


def test_features_of_another_model_are_refused(small) -> None:
    with pytest.raises(ValueError, match=r"expected features \(256, 16, 16\) of s, got None"):
        SamSegmenter(small, name="s").decode([Embedding((60, 60))], [box_prompts((3, 4, 20, 25))])


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "prefix", "whole"])
def test_a_state_of_another_architecture_is_refused(small, change) -> None:
    decoder = PromptDecoder(small, "sam_small")
    state = decoder.state()
    key = "mask_decoder.iou_token.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["mask_decoder.more"] = torch.zeros(1)
    elif change == "shape":
        state[key] = torch.zeros(1, 128)
    elif change == "prefix":
        state = {key.removeprefix("mask_decoder."): tensor for key, tensor in state.items()}
    else:
        state = small.state_dict()
    with pytest.raises(ValueError, match="expected the mask decoder of sam_small"):
        decoder.copy().load_state(state)


def test_a_copy_has_its_own_mask_decoder_and_shares_the_encoders(small) -> None:
    decoder = PromptDecoder(small, "s")
    twin = decoder.copy()
    before = twin.state()
    with torch.no_grad():
        next(twin.mask_decoder.parameters()).add_(1)
    assert twin.sam.image_encoder is small.image_encoder and twin.sam.prompt_encoder is small.prompt_encoder
    assert torch.equal(twin.sam.pixel_mean, small.pixel_mean)
    assert all(torch.equal(tensor, before[key]) for key, tensor in decoder.state().items()), "states are copies"
    assert before.keys() == {key for key in small.state_dict() if key.startswith("mask_decoder.")}
    twin.load_state(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in twin.state().items())


@pytest.mark.parametrize(("size", "expected"), [((60, 150), (26, 64)), ((150, 60), (64, 26)), ((1, 1000), (1, 64))])
def test_the_unpadded_part_by_hand(small, size, expected) -> None:
    # S = 64: 60 x 64 / 150 = 25.6.
    assert PromptDecoder(small, "s").unpadded(size) == expected
