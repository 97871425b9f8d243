"""Proposals: laws for every segmenter that makes them, tiny's grid by hand, SAM's equal to the official generator."""

from __future__ import annotations

import types
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from helpers.segmenter_suite import SIZES, images, random_sam
from segment_anything import SamAutomaticMaskGenerator

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.segmenters import (
    NEEDS_BOX,
    NO_PROPOSALS,
    REGISTRY,
    check_prompting,
)
from kmine.segmenters.base import AutomaticMaskGenerator, Embedding, proposals_of
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.sam import proposals as sam_auto
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.segmenters.tiny.network import TinyNet
from kmine.segmenters.tiny.proposals import grid_boxes, propose
from kmine.segmenters.tiny.segmenter import Tiny, open_tiny
from kmine.segmenters.tiny.weights import SHIPPED
from kmine.types import Candidate

NAMES = ("tiny", "sam")


@pytest.fixture(scope="module")
def sam():
    return random_sam()


@pytest.fixture(autouse=True)
def anything_goes(monkeypatch):
    """Random weights are sure of nothing, and a few points are enough."""
    monkeypatch.setattr(sam_auto, "MIN_PREDICTED_IOU", -9.0)
    monkeypatch.setattr(sam_auto, "MIN_STABILITY", 0.0)
    monkeypatch.setattr(sam_auto, "POINTS_PER_SIDE", 3)


@pytest.fixture
def segmenter(request, sam):
    return open_tiny(SHIPPED) if request.param == "tiny" else SamSegmenter(sam, name="sam_small")


@pytest.mark.parametrize("segmenter", NAMES, indirect=True)
def test_proposals_are_single_parts_in_the_image_s_frame(segmenter) -> None:
    found = list(segmenter.propose(segmenter.encode(images())))
    assert len(found) == len(SIZES)
    for size, one in zip(SIZES, found, strict=True):
        count = len(one.masks)
        assert count > 0 and one.masks.shape == (count, *size) and one.masks.dtype == np.bool_
        for score in (one.predicted_iou, one.stability_score):
            assert score.shape == (count,) and score.dtype == np.float32
            assert ((score >= 0) & (score <= 1)).all()
        assert [cv2.connectedComponents(mask.astype(np.uint8))[0] for mask in one.masks] == [2] * count


@pytest.mark.parametrize("segmenter", NAMES, indirect=True)
def test_embeddings_are_used_as_they_are_and_one_image_at_a_time(segmenter, monkeypatch) -> None:
    embeddings = segmenter.encode(images())
    monkeypatch.setattr(segmenter, "encode", None)
    if isinstance(segmenter, SamSegmenter):
        monkeypatch.setattr(segmenter._sam.image_encoder, "forward", None)
    together = segmenter.propose(embeddings)
    assert isinstance(together, types.GeneratorType)
    for embedding in embeddings:
        (alone,) = segmenter.propose([embedding])
        np.testing.assert_array_equal(next(together).masks, alone.masks)


@pytest.mark.parametrize("segmenter", NAMES, indirect=True)
def test_embeddings_of_another_segmenter_are_refused(segmenter) -> None:
    with pytest.raises(ValueError, match="embedding: expected"):
        next(segmenter.propose([Embedding((20, 30))]))


def test_adapted_ones_propose_too(sam) -> None:
    for segmenter in (Tiny(TinyNet()), SamSegmenter(sam, name="s")):
        adapted = segmenter.with_weights(segmenter.fine_tuner().state())
        assert isinstance(adapted, AutomaticMaskGenerator) and adapted.name.endswith("+adapted")


def test_what_is_refused_beforehand_is_what_cannot_be_done(sam) -> None:
    kinds = {"ellipse": Ellipse(), "tiny": Tiny(TinyNet()), "sam_vit_b": SamSegmenter(sam, name="s")}
    assert set(NEEDS_BOX) <= set(REGISTRY) and set(NO_PROPOSALS) <= set(REGISTRY)
    for name, segmenter in kinds.items():
        assert isinstance(segmenter, AutomaticMaskGenerator) == (name not in NO_PROPOSALS)
    check_prompting("ellipse", PromptsConfig(points=True))
    check_prompting("sam_vit_h", PromptsConfig(source="auto", box=False, points=True))
    with pytest.raises(UserError, match=r"prompts\.source: auto.*`ellipse`.*--prompts\.source local.*tiny"):
        check_prompting("ellipse", PromptsConfig(source="auto"))
    with pytest.raises(UserError, match=r"prompts\.box.*`tiny` expects a box.*--prompts\.box true"):
        check_prompting("tiny", PromptsConfig(box=False, points=True))


def test_of_a_mask_with_specks_the_largest_part_is_left() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:8, 3:9] = mask[15, 25] = True
    found = proposals_of(mask.shape, [mask], [1.2], [np.nan])
    assert np.argwhere(found.masks[0]).max(axis=0).tolist() == [7, 8] and found.masks.sum() == 36
    assert found.predicted_iou.tolist() == [1] and np.isnan(found.stability_score[0])
    assert proposals_of((4, 5), [], [], []).masks.shape == (0, 4, 5)


# -- tiny's grid


def test_the_grid_by_hand() -> None:
    boxes = grid_boxes((100, 100))
    sides = boxes[:, 2] - boxes[:, 0]
    # Side 20 in steps of 10: 9 x 9; 28: 72 / 14 = 5.1, so 7 x 7; 40: 60 / 20, 4 x 4; 55: 45 / 27.5, 3 x 3; then 2 x 2.
    assert [int((np.abs(sides - side) < 0.01).sum()) for side in (20, 28, 40, 55, 75, 95)] == [81, 49, 16, 9, 4, 4]
    assert boxes[0].tolist() == [0, 0, 20, 20] and boxes[1].tolist() == [10, 0, 30, 20]
    assert boxes[-1].tolist() == [5, 5, 100, 100]


@pytest.mark.parametrize("size", [(500, 600), (1, 1), (3, 2), (40, 1000), (1000, 40), (33, 33)])
def test_the_grid_covers_any_image_with_a_bounded_number_of_boxes(size) -> None:
    boxes = grid_boxes(size)
    assert 0 < len(boxes) <= 260
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= np.array(size[::-1]) + 1e-3).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    first = boxes[np.abs(boxes - boxes[0])[:, [1, 3]].max(axis=1) < 1e-3]  # the top row of the smallest scale
    first = first[np.abs((first[:, 2] - first[:, 0]) - (boxes[0, 2] - boxes[0, 0])) < 1e-3]
    assert first[-1, 2] == pytest.approx(size[1])
    assert (np.diff(first[:, 0]) <= (first[0, 2] - first[0, 0]) / 2 + 1e-3).all()


class Fixed(Ellipse):
    """Answers the first boxes with given masks and scores, all others with nothing."""

    def __init__(self, *answers) -> None:
        self.answers = answers

    def decode(self, embeddings, prompts):
        (answers,) = super().decode(embeddings, prompts)
        out = [replace(one, masks=np.zeros_like(one.masks), predicted_iou=np.ones(1, np.float32)) for one in answers]
        for n, (mask, score) in enumerate(self.answers):
            out[n] = Candidate(mask[None], np.full(1, score, np.float32), np.ones(1, np.float32), None, mask[None][:0])
        return [out]


def test_of_near_duplicates_the_surer_one_is_left_and_empty_answers_are_none() -> None:
    def box(left: int, width: int) -> np.ndarray:
        mask = np.zeros((40, 60), bool)
        mask[10:20, left : left + width] = True
        return mask

    # 10 x 20 against 10 x 18 inside it: box IoU 0.9; against the same one moved by 8: 12 / 28.
    segmenter = Fixed((box(5, 20), 0.6), (box(5, 18), 0.8), (box(13, 20), 0.4))
    (embedding,) = segmenter.encode([np.zeros((40, 60, 3), np.uint8)])
    found = propose(segmenter, embedding)
    assert found.predicted_iou.tolist() == pytest.approx([0.8, 0.4])
    assert (found.masks[0] == box(5, 18)).all() and (found.masks[1] == box(13, 20)).all()
    assert len(propose(Fixed(), embedding).masks) == 0


def test_tiny_finds_a_disc_that_nobody_pointed_at() -> None:
    rows, columns = np.mgrid[:120, :150]
    disc = (rows - 70) ** 2 + (columns - 48) ** 2 < 22**2
    rng = np.random.default_rng(0)
    image = np.where(disc[..., None], (170, 90, 80), (90, 50, 40)) + rng.normal(0, 6, (120, 150, 3))
    segmenter = open_tiny(SHIPPED)
    (found,) = segmenter.propose(segmenter.encode([image.clip(0, 255).astype(np.uint8)]))
    ious = [(mask & disc).sum() / (mask | disc).sum() for mask in found.masks]
    assert max(ious) > 0.8


# -- SAM


@pytest.mark.parametrize("size", [(60, 150), (90, 40)])
def test_equals_the_official_generator(sam, size) -> None:
    (image,) = images(sizes=[size])
    segmenter = SamSegmenter(sam, name="s")
    (ours,) = segmenter.propose(segmenter.encode([image]))
    official = SamAutomaticMaskGenerator(
        sam, points_per_side=3, pred_iou_thresh=-9.0, stability_score_thresh=0.0, crop_n_layers=0
    ).generate(image)
    official = [one for one in official if one["area"]]
    assert len(ours.masks) == len(official) > 0
    whole = [one["segmentation"] for one in official]
    expected = proposals_of(size, whole, [one["predicted_iou"] for one in official], [0] * len(official))
    np.testing.assert_array_equal(ours.masks, expected.masks)
    np.testing.assert_allclose(ours.predicted_iou, expected.predicted_iou, atol=1e-5)
    np.testing.assert_allclose(ours.stability_score, [one["stability_score"] for one in official], atol=1e-5)


def test_a_sam_that_is_sure_of_nothing_proposes_nothing(sam, monkeypatch) -> None:
    monkeypatch.setattr(sam_auto, "MIN_PREDICTED_IOU", 9.0)
    segmenter = SamSegmenter(sam, name="s")
    (found,) = segmenter.propose(segmenter.encode(images(sizes=[(60, 150)])))
    assert found.masks.shape == (0, 60, 150) and found.predicted_iou.shape == (0,)


def test_points_go_through_the_decoder_a_few_at_a_time(sam, monkeypatch) -> None:
    segmenter = SamSegmenter(sam, name="s")
    embeddings, seen, forward = segmenter.encode(images(sizes=[(60, 150)])), [], sam.prompt_encoder.forward

    def listen(**kwargs):
        seen.append(len(kwargs["points"][0]))
        return forward(**kwargs)

    monkeypatch.setattr(sam.prompt_encoder, "forward", listen)
    (whole,) = segmenter.propose(embeddings)
    monkeypatch.setattr(segmenter, "_queries_at_once", lambda size, num_masks: 4)
    (split,) = segmenter.propose(embeddings)
    assert seen == [9, 4, 4, 1] and len(whole.masks) == len(split.masks)
    assert torch.is_inference_mode_enabled() is False
