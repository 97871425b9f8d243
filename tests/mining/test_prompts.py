"""Prompts from hand-made probabilities, activation maps, candidates and previous masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.mining.prompts import (
    MASK_INPUT_CLIP,
    blend_previous_mask,
    doubtful_prompts,
    prompts_from_cam,
    prompts_from_mask,
    prompts_from_probs,
    prompts_with_person,
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


def test_the_largest_objects_are_prompted_where_there_are_more_than_max_objects():
    first, second = np.zeros((2, 40, 40))
    for n in range(4):
        first[2 : 4 + n, 10 * n : 10 * n + 5] = second[20 : 22 + n, 10 * n : 10 * n + 5] = 0.9
    settings = {"min_area_px": 1, "min_area_fraction": 0.0}
    found = find(probs_of(first, second), max_objects=2, **settings)
    assert [(own.class_id, int(own.component.sum())) for own in found] == [(1, 25), (1, 20), (2, 25), (2, 20)]
    assert len(find(probs_of(first, second), max_objects=None, **settings)) == 8


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


# -- several boxes, and places of middling probability


def test_further_boxes_are_multiples_of_the_tight_box_about_its_centre_with_the_margin(two_objects):
    near, far = find(probs_of(two_objects), box_scales=(1.0, 1.2, 1.5), points=True)
    plain = find(probs_of(two_objects), points=True)
    assert near.box.tolist() == [28, 8, 51, 21] and np.array_equal(near.jittered_boxes, plain[0].jittered_boxes)
    # The tight box is 19 x 9 wide (ends inclusive): a tenth and a quarter of that on each side, and 2 px of margin.
    np.testing.assert_allclose(near.scaled_boxes, [[26.1, 7.1, 52.9, 21.9], [23.25, 5.75, 55.75, 23.25]], rtol=1e-5)
    assert far.scaled_boxes[1, 0] == pytest.approx(1.75), "columns 5 to 10"
    assert np.array_equal(near.point_coords, plain[0].point_coords) and plain[0].scaled_boxes.shape == (0, 4)


def test_further_boxes_are_clipped_and_of_prompts_with_a_box_only(two_objects):
    corner = np.where(rectangle(0, 0, 20, 30), 0.9, 0.1)
    (found,) = find(probs_of(corner), box_scales=(1.5,))
    assert found.box[:2].tolist() == [0, 0] and len(found.scaled_boxes) == 0, "a single scale is the box"
    (found,) = find(probs_of(corner), box_scales=(1.0, 4.0))
    assert found.scaled_boxes[0, :2].tolist() == [0, 0] and (found.scaled_boxes[0, 2:] <= [99, 59]).all()
    assert len(find(probs_of(two_objects), box=False, points=True, box_scales=(1.0, 2.0))[0].scaled_boxes) == 0
    again = prompts_from_mask(found, rectangle(5, 5, 30, 30), PromptsConfig(box_scales=(1.0, 2.0)), seed=0)
    assert again.scaled_boxes.shape == (1, 4)


def doubtful(probs: Probs, *known: np.ndarray, class_id: int = 1, **settings: object):
    cfg = PromptsConfig(**{"doubtful": 0.2, **settings})
    return doubtful_prompts(probs, [(class_id, mask) for mask in known], cfg, seed=0, round_idx=1)


def test_places_of_middling_probability_are_prompted_by_box_alone():
    p = np.full((60, 100), 0.1)
    p[10:20, 30:50] = 0.3
    p[40:50, 5:11] = 0.2
    p[30:33, 80:83] = 0.4  # 9 px: smaller than an object
    first, second = doubtful(probs_of(p))
    assert first.box.tolist() == [28, 8, 51, 21] and second.box.tolist() == [3, 38, 12, 51]
    assert first.mask_input is None and first.component is None and first.jittered_boxes.shape == (3, 4)
    assert doubtful(probs_of(p), doubtful=None) == [] == doubtful(probs_of(p), doubtful=0.45)
    assert [len(x.scaled_boxes) for x in doubtful(probs_of(p), box_scales=(1.0, 1.5))] == [1, 1]


def test_a_place_around_or_beside_an_object_of_its_class_is_not_prompted_again(two_objects):
    two_objects[20:26, 30:50] = 0.3  # touches the first object
    two_objects[30:36, 60:70] = 0.3
    probs = probs_of(two_objects)
    known = [prompt.component for prompt in find(probs)]
    (place,) = doubtful(probs, *known)
    assert place.box.tolist() == [58, 28, 71, 37]
    assert len(doubtful(probs, *known, class_id=2)) == 3, "objects of another class do not count"


def test_the_jitter_of_a_place_depends_on_seed_round_and_sample_alone():
    probs = probs_of(np.where(rectangle(10, 30, 20, 50), 0.3, 0.0))
    cfg = PromptsConfig(doubtful=0.2)
    boxes = [
        doubtful_prompts(p, [], cfg, seed=seed, round_idx=n)[0].jittered_boxes
        for p, seed, n in [
            (probs, 0, 1),
            (probs, 0, 1),
            (probs, 1, 1),
            (probs, 0, 2),
            (replace(probs, sample_id="b"), 0, 1),
        ]
    ]
    assert np.array_equal(boxes[0], boxes[1]) and not any(np.array_equal(boxes[0], other) for other in boxes[2:])


def drawn(box=None, points=(), class_id: int = 1) -> Prompts:
    coords = np.array(points, np.float32) if points else None
    labels = np.ones(len(points), np.int64) if points else None
    return Prompts(class_id, None if box is None else np.array(box, np.float32), coords, labels, origin="person")


def with_person(probs: Probs, *person: Prompts, **settings):
    cfg = PromptsConfig(**settings)
    found = prompts_from_probs(probs, cfg, seed=0, round_idx=1)
    return prompts_with_person(probs, found, person, cfg, seed=0, round_idx=1)


def test_a_person_s_box_takes_the_place_of_the_model_s_prompt_for_the_same_object(two_objects) -> None:
    box = (28.0, 9.0, 44.0, 21.0)  # columns 30 to 44 of the object's 30 to 49: three quarters of it
    first, second = with_person(probs_of(two_objects), drawn(box))
    assert first.origin == "person" and first.box.tolist() == list(box) and len(first.jittered_boxes) == 3
    assert first.component.sum() == 15 * 10 and (first.mask_input[first.component] > 0).all()
    assert second.origin == "model" and second.component.sum() == 60
    third = with_person(probs_of(two_objects), drawn((28, 9, 38, 21)))  # less than half of it: another object
    assert [prompts.origin for prompts in third] == ["person", "model", "model"]


def test_a_box_where_the_model_sees_nothing_has_no_component(two_objects) -> None:
    first, *others = with_person(probs_of(two_objects), drawn((60, 30, 70, 40)))
    assert first.component is None and first.mask_input is None and len(others) == 2


def test_points_get_the_box_of_the_object_under_them(two_objects) -> None:
    plain = find(probs_of(two_objects))
    first, second = with_person(probs_of(two_objects), drawn(points=[(40, 15)]))
    assert first.box.tolist() == plain[0].box.tolist() and first.point_coords.tolist() == [[40, 15]]
    assert second.component.sum() == 60
    assert with_person(probs_of(two_objects), drawn(points=[(70, 35)]))[0].box is None


def test_a_second_pass_keeps_what_a_person_drew(two_objects) -> None:
    (first, _), other = with_person(probs_of(two_objects), drawn((28, 9, 44, 21))), np.zeros((60, 100), bool)
    other[30:40, 30:40] = True
    again = prompts_from_mask(first, other, PromptsConfig(), seed=0)
    assert again.box.tolist() == first.box.tolist() and (again.mask_input[other] == MASK_INPUT_CLIP).all()
