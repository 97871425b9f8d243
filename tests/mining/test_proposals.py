"""Matching of proposals to objects, on hand-made probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.config import PromptsConfig
from kmine.mining.prompts import MASK_INPUT_CLIP, prompts_from_mask, prompts_from_probs
from kmine.mining.proposals import (
    MIN_MATCH,
    NMS_IOU,
    has_foreground,
    match_proposals,
    soft_iou,
)
from kmine.ops import masks, metrics
from kmine.segmenters.base import Proposals
from kmine.types import Probs

CFG = PromptsConfig()
SHAPE = (60, 100)


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[top:bottom, left:right] = True
    return mask


def proposals(*found: np.ndarray) -> Proposals:
    stack = np.stack(found) if found else np.zeros((0, *SHAPE), bool)
    return Proposals(stack, np.ones(len(found), np.float32), np.ones(len(found), np.float32))


def probs_of(*foregrounds: np.ndarray) -> Probs:
    planes = [np.asarray(f, np.float32) for f in foregrounds]
    return Probs("a", np.stack([1 - sum(planes), *planes]))


def matched(probs: Probs, *found: np.ndarray, cfg: PromptsConfig = CFG):
    local = prompts_from_probs(probs, cfg, seed=0, round_idx=1)
    return local, match_proposals(probs, local, proposals(*found), cfg)


NEAR, FAR = rectangle(10, 30, 20, 50), rectangle(40, 5, 50, 11)  # 200 and 60 pixels


@pytest.fixture
def two() -> Probs:
    return probs_of(np.where(NEAR, 0.9, np.where(FAR, 0.8, 0.05)))


def test_soft_iou_by_hand() -> None:
    # Minima 0.8 + 0; maxima 1 + 0.2 + 1 + 0.6.
    prob = np.array([[0.8, 0.2], [0.0, 0.6]], np.float32)
    assert soft_iou(np.array([[True, False], [True, False]]), prob) == pytest.approx(0.8 / 2.8)
    assert soft_iou(NEAR, FAR.astype(np.float32)) == 0
    assert soft_iou(NEAR, NEAR.astype(np.float32)) == 1


def test_each_object_gets_the_proposal_that_matches_it_best(two) -> None:
    loose, shifted, part = rectangle(5, 25, 25, 60), rectangle(11, 30, 21, 50), rectangle(10, 30, 20, 42)
    local, out = matched(two, loose, FAR, shifted, part)
    assert [match.prompts for match in out] == local, "one match an object, in the order of the local prompts"
    assert (out[0].mask == shifted).all() and (out[1].mask == FAR).all()


def test_without_a_match_the_local_prompt_is_kept(two) -> None:
    # Half of the object's pixels at probability 0.9: soft IoU is below 90 / (100 + 90), under 0.5.
    slice_, elsewhere = rectangle(10, 30, 15, 50), rectangle(30, 60, 50, 90)
    local, out = matched(two, slice_, elsewhere)
    assert [match.mask for match in out] == [None, None] and [match.prompts for match in out] == local
    local, out = matched(two)
    assert [match.mask for match in out] == [None, None] and [match.prompts for match in out] == local


def test_a_match_below_the_bound_is_none_and_one_at_the_bound_is() -> None:
    probs, cfg = probs_of(NEAR.astype(float)), PromptsConfig(box_margin=0.0)
    below, at = rectangle(10, 30, 20, 39), rectangle(10, 30, 20, 40)  # 90 and 100 of 200 certain pixels
    assert matched(probs, below, cfg=cfg)[1][0].mask is None
    assert (matched(probs, at, cfg=cfg)[1][0].mask == at).all() and MIN_MATCH == 0.5


def test_low_probabilities_all_over_the_image_prevent_no_match() -> None:
    probs = probs_of(np.where(NEAR, 0.9, 0.3))
    assert 0.3 * NEAR.size > 5 * NEAR.sum(), "summed over the image they exceed the object"
    assert (matched(probs, NEAR)[1][0].mask == NEAR).all()


def test_two_proposals_of_one_object_are_not_both_matched() -> None:
    left, right = rectangle(10, 20, 30, 40), rectangle(10, 42, 30, 62)
    probs = probs_of(np.where(left | right, 1.0, 0.0))
    # Each is one object and 19 of 20 columns of the other: soft IoU 400 / 780 with that one, IoU 760 / 800 of the two.
    near_duplicates = [left | right & rectangle(0, 0, 60, 61), right | left & rectangle(0, 21, 60, 100)]
    assert sorted(match.mask is None for match in matched(probs, *near_duplicates)[1]) == [False, True]
    _, out = matched(probs, *near_duplicates, left, right)
    assert (out[0].mask == left).all() and (out[1].mask == right).all()


def test_another_object_inside_the_box_is_not_part_of_the_object() -> None:
    corner = rectangle(5, 5, 45, 15) | rectangle(5, 5, 15, 60)  # an L, and a block in its box
    block = rectangle(25, 30, 40, 50)
    _, out = matched(probs_of(np.where(corner | block, 0.9, 0.0)), corner | block, corner)
    assert (out[0].mask == corner).all()


def test_scattered_pieces_become_one_object_without_a_component() -> None:
    pieces = np.zeros(SHAPE, bool)
    for left in (60, 66, 72, 78):
        pieces[30:34, left : left + 4] = True  # 16 pixels each, under min_area_px
    around, looser, improbable = rectangle(30, 60, 34, 82), rectangle(29, 60, 34, 82), rectangle(20, 50, 45, 90)
    probs = probs_of(np.where(pieces, 0.95, np.where(NEAR, 0.9, 0.05)))
    local, out = matched(probs, improbable, looser, around, NEAR)
    assert len(local) == 1 and len(out) == 2
    assert (out[1].mask == around).all()
    assert out[1].prompts.component is None and out[1].prompts.class_id == 1
    assert len(matched(probs, around & pieces & rectangle(0, 0, 60, 64))[1]) == 1, "one piece stays too small"


def test_a_part_of_an_object_is_not_a_new_object(two) -> None:
    inside = rectangle(12, 32, 16, 44)
    _, out = matched(two, NEAR, inside)
    assert len(out) == 2 and (out[0].mask == NEAR).all()
    assert len(matched(two, inside)[1]) == 2


def test_without_probable_pixels_nothing_is_matched() -> None:
    probs = probs_of(np.full(SHAPE, 0.49))
    local, out = matched(probs, NEAR, FAR)
    assert out == [] and not has_foreground(probs, local, CFG)
    assert has_foreground(probs_of(np.full(SHAPE, 0.5)), [], CFG)


def test_classes_are_kept_apart() -> None:
    liver, tumour = rectangle(5, 5, 45, 60), rectangle(20, 25, 30, 45)
    probs = probs_of(np.where(liver & ~tumour, 0.9, 0.05), np.where(tumour, 0.9, 0.0))
    _, out = matched(probs, liver, tumour)
    assert [(match.prompts.class_id, int(match.mask.sum())) for match in out] == [(1, liver.sum()), (2, tumour.sum())]


@pytest.mark.parametrize("seed", range(5))
def test_laws_on_random_proposals(seed) -> None:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(30):
        top, left = rng.integers(0, 40), rng.integers(0, 80)
        found.append(rectangle(top, left, top + rng.integers(4, 20), left + rng.integers(4, 30)))
    prob = np.clip(sum(mask * rng.uniform(0.2, 0.9) for mask in found[:6]) + 0.05, 0, 1)
    local, out = matched(probs_of(prob), *found)
    assert local and len(out) >= len(local), "never fewer objects than the local model's own"
    assert all(match.prompts is own for match, own in zip(out, local, strict=False))
    assert all(match.mask is not None and match.prompts.component is None for match in out[len(local) :])
    chosen = [match.mask for match in out if match.mask is not None]
    assert chosen and all(any(mask is part or (mask == part).all() for part in found) for mask in chosen)
    own = chosen[: sum(match.mask is not None for match in out[: len(local)])]
    assert all(metrics.iou(a, b) < NMS_IOU for n, a in enumerate(own) for b in own[:n])


def test_the_prompt_of_a_match_is_of_the_mask_and_keeps_the_component(two) -> None:
    shifted = rectangle(11, 31, 21, 52)
    local, out = matched(two, shifted)
    prompt = prompts_from_mask(out[0].prompts, out[0].mask, PromptsConfig(points=True), seed=0)
    assert prompt.box.tolist() == [29, 9, 53, 22], "2 px around columns 31-51, rows 11-20"
    assert (prompt.mask_input == np.where(shifted, MASK_INPUT_CLIP, -MASK_INPUT_CLIP)).all()
    assert (prompt.point_coords[0] == masks.inner_point(shifted)).all() and prompt.jittered_boxes.shape == (3, 4)
    assert prompt.component is local[0].component and (prompt.component == NEAR).all()


def test_where_nothing_is_found_the_most_probable_proposal_is_an_object_from_the_doubtful_level_on() -> None:
    cfg = PromptsConfig(doubtful=0.2)
    probs = probs_of(np.where(NEAR, 0.4, np.where(FAR, 0.3, 0.05)))
    assert has_foreground(probs, [], cfg) and not has_foreground(probs, [], CFG)
    loose, tiny = rectangle(5, 25, 25, 60), rectangle(10, 30, 12, 32)
    _, (found,) = matched(probs, FAR, loose, NEAR, tiny, cfg=cfg)
    assert (found.mask == NEAR).all() and found.prompts.component is None and found.prompts.class_id == 1
    assert matched(probs, FAR, loose, NEAR)[1] == [], "not without the setting"
    assert matched(probs, rectangle(0, 60, 20, 90), tiny, cfg=cfg)[1] == [], "nothing probable, nothing large"


def test_beside_an_object_of_its_class_an_improbable_proposal_is_none(two) -> None:
    cfg = PromptsConfig(doubtful=0.2)
    third = rectangle(30, 60, 50, 90)
    assert len(matched(probs_of(np.where(third, 0.4, two.probs[1])), third, cfg=cfg)[1]) == 2
    both = probs_of(two.probs[1], np.where(third, 0.4, 0.0))
    _, out = matched(both, third, cfg=cfg)
    assert [(match.prompts.class_id, match.mask is None) for match in out] == [(1, True), (1, True), (2, False)]
