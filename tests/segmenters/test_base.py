"""The checks that all segmenters share, and every kind of prompt on every segmenter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers.segmenter_suite import images, random_sam

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.mining.prompts import prompts_from_mask, prompts_from_probs
from kmine.segmenters import check_prompting
from kmine.segmenters.base import (
    Embedding,
    PromptedExample,
    candidate_of,
    check_example,
    check_images,
    check_logits,
    check_prompts,
    clip_boxes,
    proposals_of,
    stability_from_logits,
)
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.registry import NEEDS_BOX
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.segmenters.tiny import SHIPPED
from kmine.segmenters.tiny.segmenter import open_tiny
from kmine.types import Candidate, Probs, Prompts

BOX = np.array([1, 1, 5, 5], np.float32)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5), np.uint8), "grey"),
        (np.zeros((4, 5, 1), np.uint8), "grey"),
        (np.zeros((4, 5, 4), np.uint8), "alpha"),
        (np.zeros((3, 4, 5), np.uint8), "last axis"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 5, 3), np.float32), "astype"),
    ],
)
def test_unfit_images_are_refused_with_the_cure(image, words) -> None:
    with pytest.raises(ValueError, match=f"expected .H, W, 3. uint8 RGB .*{image.dtype}.*{words}"):
        check_images([image])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (Prompts(1, None), "got neither"),
        (Prompts(1, None, mask_input=np.zeros((8, 10), np.float32)), "got neither"),
        (Prompts(1, np.array([5, 5, 5, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([np.nan, 5, 7, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([1, 5, np.inf, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([10, 1, 14, 5], np.float32)), "entirely outside the image, 10 wide and 8 high"),
        (Prompts(1, BOX, jittered_boxes=np.array([[-9, 1, 0, 5]], np.float32)), "entirely outside"),
        (Prompts(1, BOX, np.array([[3, 9]], np.float32), np.array([1])), "outside the image"),
        (Prompts(1, BOX, np.array([[3, 3]], np.float32), None), "point_labels"),
        (Prompts(1, None, np.zeros((0, 2), np.float32), np.zeros(0, np.int64)), "P >= 1"),
        (Prompts(1, BOX, np.array([[3, 3]], np.float32), np.array([2])), "1 .foreground."),
        (Prompts(1, BOX, mask_input=np.zeros((10, 8), np.float32)), r"\(8, 10\), got \(10, 8\)"),
        (Prompts(1, BOX, mask_input=np.full((8, 10), np.nan, np.float32)), "NaN"),
        (
            Prompts(1, None, np.array([[3, 3]], np.float32), np.array([1]), jittered_boxes=BOX[None]),
            "jittered boxes without a box",
        ),
    ],
)
def test_unfit_prompts_are_refused_with_the_reason(prompts, words) -> None:
    with pytest.raises(ValueError, match=words):
        check_prompts(prompts, (8, 10))


def test_points_up_to_the_outer_edge_of_the_last_pixel_are_fit() -> None:
    coords = np.array([[-0.5, -0.5], [9.5, 7.5]], np.float32)
    check_prompts(Prompts(1, None, coords, np.array([1, 0])), (8, 10))


def test_boxes_are_clipped_to_the_image() -> None:
    clipped = clip_boxes(np.array([[-2, 1, 99, 8.5], [1, 2, 3, 4]], np.float32), (8, 10))
    assert clipped.tolist() == [[0, 1, 10, 8], [1, 2, 3, 4]]


def test_stability_by_hand() -> None:
    # Above +1: one pixel; above -1: three. Then nothing above -1; then everything above both.
    logits = np.array([[[2, 0.5], [-0.5, -3]], [[-2, -2], [-2, -1]], [[5, 5], [5, 5]]], np.float32)
    np.testing.assert_allclose(stability_from_logits(logits), [1 / 3, np.nan, 1], rtol=1e-6)
    assert stability_from_logits(logits, threshold=0.5, offset=0.5)[0] == 0.5


def test_proposals_keep_the_largest_component() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:8, 3:9] = mask[15, 25] = True
    proposals = proposals_of(mask.shape, [mask], [1.2], [np.nan])
    assert np.argwhere(proposals.masks[0]).max(axis=0).tolist() == [7, 8] and proposals.masks.sum() == 36
    assert proposals.predicted_iou.tolist() == [1] and np.isnan(proposals.stability_score[0])
    assert proposals_of((4, 5), [], [], []).masks.shape == (0, 4, 5)


def test_a_candidate_has_its_own_masks_and_the_best_mask_of_each_jittered_box() -> None:
    def row(fill: int, *scores: float) -> Candidate:
        masks = np.zeros((len(scores), 2, 3), np.bool_)
        masks[:, 0, fill] = masks[1:, 1] = True
        return Candidate(masks, np.array(scores, np.float32), np.full(len(scores), np.nan), None, masks[:0])

    # Both scores of the first jittered box exceed 1: clipping before the choice would make them equal.
    own, first, second = row(0, 1.25, -0.5), row(1, 1.25, 1.5), row(2, 0.5, 0.25)
    candidate = candidate_of([own, first, second])
    assert candidate.masks is own.masks and candidate.predicted_iou.tolist() == [1, 0]
    assert np.array_equal(candidate.jittered_masks, [first.masks[1], second.masks[0]])
    alone = candidate_of([own]).jittered_masks
    assert alone.shape == (0, 2, 3) and alone.dtype == candidate.jittered_masks.dtype == np.bool_


def test_a_mask_of_another_size_is_refused_as_an_example() -> None:
    example = PromptedExample(Embedding((8, 10)), Prompts(1, BOX), np.zeros((10, 8), np.bool_))
    with pytest.raises(ValueError, match=r"\(H, W\) = \(8, 10\), got \(10, 8\)"):
        check_example(example)
    check_example(replace(example, mask=example.mask.T))


def test_logits_that_are_not_finite_are_refused() -> None:
    check_logits(True, "s")
    with pytest.raises(UserError, match="segmenter `s`: expected finite logits"):
        check_logits(False, "s")


SIZE = (60, 90)
PROMPT_KINDS = [
    {"box": box, "points": points, "mask_hint": mask_hint}
    for box, points, mask_hint in product((True, False), repeat=3)
    if box or points
]
OPEN = {
    "ellipse": Ellipse,
    "tiny": lambda: open_tiny(SHIPPED),
    "sam_vit_b": lambda: SamSegmenter(random_sam(), name="sam_vit_b"),
}


@pytest.fixture(scope="module", params=OPEN)
def named_segmenter(request):
    return request.param, OPEN[request.param]()


@pytest.fixture(scope="module")
def probs() -> Probs:
    belief = np.full(SIZE, 0.1, np.float32)
    belief[5:25, 10:30] = 0.9
    belief[5:12, 22:30] = 0.1  # a notch: room for a background point
    belief[35:50, 50:80] = 0.8
    return Probs("a", np.stack([1 - belief, belief]))


@pytest.mark.parametrize("kinds", PROMPT_KINDS, ids=lambda kinds: "+".join(name for name, on in kinds.items() if on))
@pytest.mark.parametrize("passes", [1, 2])
def test_every_component_gets_a_candidate_from_every_kind_of_prompt(named_segmenter, probs, kinds, passes) -> None:
    name, segmenter = named_segmenter
    cfg = PromptsConfig(num_jitters=2, **kinds)
    prompts = prompts_from_probs(probs, cfg, seed=0, round_idx=1)
    assert len(prompts) == 2
    for prompt in prompts:
        assert (prompt.box is not None) == kinds["box"] and (prompt.point_coords is not None) == kinds["points"]
        assert (prompt.mask_input is not None) == kinds["mask_hint"]
    embeddings = segmenter.encode(images(sizes=[SIZE]))
    if name in NEEDS_BOX and not cfg.box:
        with pytest.raises(UserError, match=r"prompts\.box"):
            check_prompting(name, cfg)
        with pytest.raises(UserError, match=r"prompts\.box"):
            segmenter.decode(embeddings, [prompts])
        return
    check_prompting(name, cfg)
    (candidates,) = segmenter.decode(embeddings, [prompts])
    if passes == 2:
        pairs = zip(prompts, candidates, strict=True)
        prompts = [prompts_from_mask(prompt, c.masks[c.best], cfg, seed=0) for prompt, c in pairs]
        (candidates,) = segmenter.decode(embeddings, [prompts])
    assert len(candidates) == 2
    for candidate in candidates:
        assert candidate.masks.shape[1:] == SIZE and len(candidate.jittered_masks) == (2 if cfg.box else 0)
