"""Prompts from hand-made probabilities, activation maps, candidates and previous masks."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.mining.prompts import (
    MASK_INPUT_CLIP,
    blend_previous_mask,
    prompts_from_cam,
    prompts_from_mask,
    prompts_from_probs,
)
from kmine.types import Probs, Prompts


def probs_of(*foregrounds: np.ndarray, sample_id: str = "a") -> Probs:
    planes = [np.asarray(f, np.float32) for f in foregrounds]
    return Probs(sample_id, np.stack([1 - sum(planes), *planes]))


def find(probs: Probs, seed: int = 0, round_idx: int = 1, **settings: object):
    return prompts_from_probs(probs, PromptsConfig(**settings), seed=seed, round_idx=round_idx)


@pytest.fixture
def two_objects() -> np.ndarray:
    p = np.full((60, 100), 0.1)
    p[10:20, 30:50] = 0.9  # rows 10-19, columns 30-49
    p[40:50, 5:11] = 0.8
    p[55, 90] = 0.99  # one pixel: under every minimum
    return p


def test_one_prompt_a_component_largest_first_small_ones_dropped(two_objects):
    found = find(probs_of(two_objects))
    assert [int(f.component.sum()) for f in found] == [200, 60]
    assert {f.class_id for f in found} == {1}


def test_box_is_x_then_y_grown_by_at_least_two_pixels(two_objects):
    assert find(probs_of(two_objects))[0].box.tolist() == [28, 8, 51, 21]


def test_minimum_area_is_the_larger_of_pixels_and_share(two_objects):
    assert len(find(probs_of(two_objects), min_area_px=61)) == 1
    assert len(find(probs_of(two_objects), min_area_fraction=0.011)) == 1  # 66 of 6000 pixels
    assert len(find(probs_of(two_objects), min_area_px=1, min_area_fraction=0.0)) == 3


def test_without_foreground_there_is_no_prompt():
    assert find(probs_of(np.full((40, 40), 0.2))) == []


def test_points_are_xy_foreground_inside_background_outside_the_object():
    p = np.full((80, 80), 0.1)
    p[20:60, 20:30] = 0.9
    p[20:30, 20:60] = 0.9  # an L: the box has an empty corner
    (found,) = find(probs_of(p), points=True)
    assert found.point_labels.tolist() == [1, 0]
    (fx, fy), (bx, by) = found.point_coords.astype(int)
    assert found.component[fy, fx] and not found.component[by, bx]
    assert bx > 40 and by > 40
    solid = np.full((80, 80), 0.1)
    solid[20:60, 20:60] = 0.9
    assert find(probs_of(solid), points=True, box_margin=0.0)[0].point_labels.tolist() == [1]


def test_the_mask_input_is_the_clipped_logit_with_other_objects_as_background(two_objects):
    two_objects[0, 0] = 0.5
    mask_input = find(probs_of(two_objects))[0].mask_input
    assert mask_input.shape == two_objects.shape and mask_input.dtype == np.float32
    assert mask_input[15, 40] == pytest.approx(np.log(9), rel=1e-4)
    assert mask_input[45, 8] == -MASK_INPUT_CLIP
    assert np.abs(find(probs_of(np.where(two_objects > 0.5, 1.0, 0.0)))[0].mask_input).max() == MASK_INPUT_CLIP


def test_classes_are_kept_apart():
    liver, tumour = np.zeros((50, 50)), np.zeros((50, 50))
    liver[5:45, 5:25] = 0.9
    tumour[20:30, 25:35] = 0.9
    assert [f.class_id for f in find(probs_of(liver, tumour))] == [1, 2]


def test_jitter_depends_on_seed_round_and_sample_alone(two_objects):
    first = find(probs_of(two_objects))[0].jittered_boxes
    assert first.shape == (3, 4)
    assert np.array_equal(first, find(probs_of(two_objects))[0].jittered_boxes)
    for other in (
        find(probs_of(two_objects), seed=1),
        find(probs_of(two_objects), round_idx=2),
        find(probs_of(two_objects, sample_id="b")),
    ):
        assert not np.array_equal(first, other[0].jittered_boxes)


def test_points_alone_have_no_box_and_no_jitter(two_objects):
    found = find(probs_of(two_objects), box=False, points=True, mask_hint=False)[0]
    assert found.box is None and found.mask_input is None and len(found.jittered_boxes) == 0
    with pytest.raises(UserError, match=r"prompts\.box"):
        PromptsConfig(box=False, points=False)


def test_an_activation_map_gives_one_prompt_for_its_largest_component():
    cam = np.zeros((40, 60), np.float32)
    cam[5:15, 10:30] = 0.8
    cam[30:36, 40:46] = 1.0
    cam[20:25, 0:5] = 0.5  # at half the highest value, not above
    key = {"sample_id": "a", "seed": 0, "round_idx": 1}
    (found,) = prompts_from_cam(cam, 2, PromptsConfig(num_jitters=2), **key)
    assert found.class_id == 2 and found.mask_input is None
    assert found.component.sum() == 200
    np.testing.assert_array_equal(found.box, [8, 3, 31, 16])  # two pixels around the tight box, at least
    assert found.jittered_boxes.shape == (2, 4)
    (again,) = prompts_from_cam(cam, 2, PromptsConfig(num_jitters=2), **key)
    np.testing.assert_array_equal(found.jittered_boxes, again.jittered_boxes)


def test_an_activation_map_without_a_large_component_gives_no_prompt():
    key = {"sample_id": "a", "seed": 0, "round_idx": 1}
    assert prompts_from_cam(np.zeros((40, 60), np.float32), 1, PromptsConfig(), **key) == []
    cam = np.zeros((40, 60), np.float32)
    cam[3:6, 3:6] = 1
    assert prompts_from_cam(cam, 1, PromptsConfig(), **key) == []


# -- a second pass, and the round before


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((60, 100), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_a_second_pass_prompts_with_box_and_mask_of_the_first(two_objects):
    prompt = find(probs_of(two_objects))[0]
    again = prompts_from_mask(prompt, rectangle(12, 34, 24, 60), PromptsConfig(num_jitters=2), seed=0)
    assert again.box.tolist() == [32, 10, 61, 25], "2 px around columns 34-59, rows 12-23"
    assert (again.mask_input == np.where(rectangle(12, 34, 24, 60), MASK_INPUT_CLIP, -MASK_INPUT_CLIP)).all()
    assert again.component is prompt.component and again.class_id == 1 and len(again.jittered_boxes) == 2


def test_an_empty_mask_leaves_the_prompt_unchanged(two_objects):
    prompt = find(probs_of(two_objects))[0]
    assert prompts_from_mask(prompt, np.zeros((60, 100), bool), PromptsConfig(), seed=0) is prompt


def test_without_mask_hint_a_second_pass_has_no_mask_input(two_objects):
    prompt = find(probs_of(two_objects))[0]
    again = prompts_from_mask(prompt, rectangle(0, 0, 9, 9), PromptsConfig(mask_hint=False), seed=0)
    assert again.mask_input is None


def test_the_previous_mask_of_the_same_object_and_class_is_blended_in(two_objects):
    near, far = find(probs_of(two_objects))
    previous = [
        (1, lambda: rectangle(10, 30, 20, 60)),
        (2, lambda: near.component),
        (1, lambda: rectangle(0, 60, 9, 99)),
    ]
    blended, unchanged = blend_previous_mask([near, far], previous)
    assert unchanged is far
    mask = rectangle(10, 30, 20, 60)
    assert np.allclose(blended.mask_input, (near.mask_input + np.where(mask, MASK_INPUT_CLIP, -MASK_INPUT_CLIP)) / 2)
    assert blended.box is near.box
    (without_input,) = blend_previous_mask([Prompts(1, near.box, component=near.component)], previous[:1])
    assert np.allclose(without_input.mask_input, np.where(mask, MASK_INPUT_CLIP, -MASK_INPUT_CLIP) / 2)
    assert blend_previous_mask([near], []) == [near]
