"""`tiny`: the suite on random and on shipped weights, the ellipse of an untrained network, odd boxes and images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import SegmenterSuite, assert_same, box_prompts, images, random_net

from kmine.config import SegmenterConfig
from kmine.errors import UserError
from kmine.segmenters import open_segmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny.network import TinyNet
from kmine.segmenters.tiny.segmenter import Tiny
from kmine.segmenters.tiny.window import window_of
from kmine.types import Prompts


class TestTiny(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return Tiny(random_net(), batch_size=4)

    @pytest.fixture(scope="class")
    def other(self):
        return Tiny(random_net(seed=1))


class TestShipped(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=True)

    @pytest.fixture(scope="class")
    def other(self):
        return Tiny(random_net())


EDGE_BOXES = {
    "inner": (3, 4, 20, 25),
    "corner": (0, 0, 9, 7),
    "over_the_border": (-9, 4, 99, 70),
    "whole": (0, 0, 60, 40),
    "one_pixel": (7.5, 3.5, 8.5, 4.5),
    "thin": (2, 10, 58, 11.5),
}


@pytest.mark.parametrize("box", EDGE_BOXES.values(), ids=EDGE_BOXES)
def test_an_untrained_network_gives_the_ellipse(box) -> None:
    picture = images()[:1]
    untrained, ellipse = Tiny(TinyNet()), Ellipse()
    prompts = [box_prompts(box, jitters=2 if box[2] - box[0] > 2 else 0)]
    (ours,), (expected,) = (s.decode(s.encode(picture), prompts)[0] for s in (untrained, ellipse))
    np.testing.assert_array_equal(ours.masks, expected.masks)
    np.testing.assert_array_equal(ours.jittered_masks, expected.jittered_masks)


@pytest.mark.parametrize("box", EDGE_BOXES.values(), ids=EDGE_BOXES)
def test_masks_stay_inside_the_window(box) -> None:
    segmenter = Tiny(random_net())
    (prompts,) = box_prompts(box)
    candidate = segmenter.decode(segmenter.encode(images()[:1]), [[prompts]])[0][0]
    assert 0 <= candidate.predicted_iou[0] <= 1
    assert np.isfinite(candidate.low_res_logits).all()
    window = window_of(np.clip(box, 0, [60, 40, 60, 40]), 96)
    outside = np.ones((40, 60), bool)
    outside[max(window.top, 0) : window.top + window.height, max(window.left, 0) : window.left + window.width] = False
    assert not (candidate.masks[0] & outside).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 3), (20, 30), (1, 80), (80, 1)])
def test_images_smaller_than_the_crop(size) -> None:
    segmenter = Tiny(random_net())
    embeddings = segmenter.encode([np.zeros((*size, 3), np.uint8)])
    candidate = segmenter.decode(embeddings, [box_prompts((0, 0, size[1], size[0]))])[0][0]
    assert candidate.masks.shape == (1, *size)


def test_the_batch_size_does_not_matter() -> None:
    prompts = [box_prompts((3, 4, 20, 25), (1, 1, 9, 9), jitters=3), box_prompts((0, 0, 30, 30)), []]
    one, many = (Tiny(random_net(), batch_size=size) for size in (1, 64))
    for a, b in zip(*(s.decode(s.encode(images()), prompts)[0] for s in (one, many)), strict=True):
        assert_same(a, b, flipped=2e-3)


def test_points_and_mask_inputs_change_masks_and_may_share_a_batch() -> None:
    segmenter = Tiny(random_net())
    box = np.array((10, 5, 40, 30), np.float32)
    point = {"point_coords": np.array([[20, 12], [12, 8]], np.float32), "point_labels": np.array([1, 0])}
    mask_input = np.where(np.arange(60) < 25, 9, -9).astype(np.float32) * np.ones((40, 1), np.float32)
    prompts_of_image = [Prompts(1, box), Prompts(1, box, **point), Prompts(1, box, mask_input=mask_input)]
    embeddings = segmenter.encode(images()[:1])
    together = segmenter.decode(embeddings, [prompts_of_image])[0]
    for candidate, prompts in zip(together, prompts_of_image, strict=True):
        assert_same(candidate, segmenter.decode(embeddings, [[prompts]])[0][0], flipped=2e-3)
    plain, with_points, with_mask = (candidate.low_res_logits for candidate in together)
    assert np.abs(plain - with_points).max() > 1e-3
    assert np.abs(plain - with_mask).max() > 1e-3


UNFIT = {
    "box beside the image": (Prompts(1, np.array([60, 1, 70, 5], np.float32)), "entirely outside the image, 60 wide"),
    "box without area": (Prompts(1, np.array([5, 9, 20, 9], np.float32)), "x0 < x1 and y0 < y1"),
    "corners swapped": (Prompts(1, np.array([20, 20, 5, 9], np.float32)), "swap the corners"),
    "jittered box beside the image": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), jittered_boxes=np.array([[3, 40, 9, 50]], np.float32)),
        r"box .3.0, 40.0, 9.0, 50.0.: it lies entirely outside",
    ),
    "point beside the image": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), np.array([[30, 50]], np.float32), np.array([1])),
        "outside the image, 60 wide and 40 high",
    ),
    "mask input of another size": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), mask_input=np.zeros((96, 96), np.float32)),
        r"mask_input: expected the image's own .H, W. = .40, 60., got .96, 96.",
    ),
}


@pytest.mark.parametrize(("prompts", "words"), UNFIT.values(), ids=UNFIT)
def test_unfit_prompts_are_refused_with_the_cure(prompts, words) -> None:
    segmenter = Tiny(TinyNet())
    with pytest.raises(ValueError, match=words):
        segmenter.decode(segmenter.encode(images()[:1]), [[*box_prompts((3, 4, 9, 9)), prompts]])


def test_points_without_a_box_are_refused_with_the_setting() -> None:
    segmenter = Tiny(TinyNet())
    prompts = Prompts(1, None, np.array([[2, 2]], np.float32), np.array([1]))
    with pytest.raises(UserError, match=r"prompts\.box"):
        segmenter.decode(segmenter.encode([np.zeros((5, 5, 3), np.uint8)]), [[prompts]])


def test_embeddings_of_another_segmenter_are_refused() -> None:
    embeddings = Ellipse().encode([np.zeros((5, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="encode the image again"):
        Tiny(TinyNet()).decode(embeddings, [box_prompts((1, 1, 3, 3))])


def test_logits_that_are_nan_are_refused_with_the_name() -> None:
    net = random_net()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    segmenter = Tiny(net, name="tiny:mine")
    with pytest.raises(UserError, match="segmenter `tiny:mine`: expected finite logits"):
        segmenter.decode(segmenter.encode(images(sizes=[(60, 60)])), [box_prompts((3, 4, 20, 25))])
