"""The segmenter encodes prompted images once, and no others; in two passes as in one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kmine.mining.segment import merge_boxes, segment, segment_twice
from kmine.segmenters.ellipse import Ellipse
from kmine.types import Candidate, Prompts, Sample


class Counting(Ellipse):
    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    def encode(self, images):
        self.encoded.append(len(images))
        return super().encode(images)


def test_images_without_prompts_are_not_encoded_and_candidates_stay_in_place():
    samples = [Sample(str(n), str(n), np.full((20, 30, 3), n, np.uint8)) for n in range(4)]
    prompts = [
        [],
        [Prompts(1, np.array([2, 2, 8, 8], np.float32))],
        [],
        [Prompts(1, np.array([0, 0, 29, 19], np.float32))] * 2,
    ]
    segmenter = Counting()
    candidates = segment(segmenter, samples, prompts)
    assert [len(a) for a in candidates] == [0, 1, 0, 2]
    assert segmenter.encoded == [2]
    assert candidates[1][0].masks.sum() < candidates[3][0].masks.sum()


def test_no_prompt_at_all_gives_no_candidate():
    samples = [Sample("a", "a", np.zeros((5, 5, 3), np.uint8))]
    assert segment(Counting(), samples, [[]]) == [[]]


def box(*corners: float) -> Prompts:
    return Prompts(1, np.array(corners, np.float32))


def test_the_second_pass_is_prompted_by_the_first_on_the_same_embeddings():
    samples = [Sample(str(n), str(n), np.zeros((20, 30, 3), np.uint8)) for n in range(3)]
    segmenter, seen = Counting(), []

    def reprompt(image, number, prompt, candidate):
        seen.append((image, number, int(candidate.masks[candidate.best].sum())))
        return replace(prompt, box=prompt.box + 5)

    prompts = [[box(2, 2, 8, 8)], [], [box(0, 0, 9, 9), box(1, 1, 4, 4)]]
    reprompted, candidates = segment_twice(segmenter, samples, prompts, reprompt)
    once = segment(segmenter, samples, prompts)
    moved = segment(segmenter, samples, reprompted)
    assert [(n, k) for n, k, _ in seen] == [(0, 0), (2, 0), (2, 1)] and segmenter.encoded == [2, 2, 2]
    assert [area for *_, area in seen] == [int(a.masks[a.best].sum()) for image in once for a in image]
    assert reprompted[2][1].box.tolist() == [6, 6, 9, 9]
    assert all(
        np.array_equal(a.masks, b.masks)
        for x, y in zip(candidates, moved, strict=True)
        for a, b in zip(x, y, strict=True)
    )


class EmptyOnTheRight(Ellipse):
    """Empty masks for boxes right of column 10."""

    def decode(self, embeddings, prompts):
        candidates = super().decode(embeddings, prompts)
        for image, image_prompts in zip(candidates, prompts, strict=True):
            for k, prompt in enumerate(image_prompts):
                if prompt.box[0] > 10:
                    image[k] = replace(image[k], masks=np.zeros_like(image[k].masks))
        return candidates


def test_an_empty_second_candidate_leaves_the_first_one():
    samples = [Sample("a", "a", np.zeros((20, 30, 3), np.uint8))]
    first = [[box(2, 2, 8, 8), box(3, 3, 9, 9)]]
    moves = (9.0, 1.0)
    reprompted, candidates = segment_twice(
        EmptyOnTheRight(), samples, first, lambda n, k, prompt, candidate: replace(prompt, box=prompt.box + moves[k])
    )
    assert reprompted[0][0].box.tolist() == [2, 2, 8, 8] and reprompted[0][1].box.tolist() == [4, 4, 10, 10]
    assert all(candidate.masks.any() for candidate in candidates[0])


class Recording(Ellipse):
    def decode(self, embeddings, prompts):
        self.seen = prompts
        return super().decode(embeddings, prompts)


def test_each_box_is_a_prompt_of_its_own_and_an_object_has_one_candidate():
    samples = [Sample(str(n), str(n), np.zeros((40, 60, 3), np.uint8)) for n in range(2)]
    further, jittered = (
        np.array(boxes, np.float32) for boxes in ([[9, 9, 31, 31], [5, 5, 35, 35]], [[11, 10, 30, 30]])
    )
    own = {"point_coords": np.array([[20, 20]], np.float32), "point_labels": np.array([1])}
    several = replace(box(10, 10, 30, 30), **own, jittered_boxes=jittered, scaled_boxes=further)
    segmenter = Recording()
    candidates = segment(segmenter, samples, [[box(2, 2, 8, 8), several], [several]])
    assert [len(of_image) for of_image in candidates] == [2, 1]
    assert [prompt.box.tolist() for prompt in segmenter.seen[0]] == [[2, 2, 8, 8], [10, 10, 30, 30], *further.tolist()]
    assert [len(prompt.jittered_boxes) for prompt in segmenter.seen[0]] == [0, 1, 0, 0]
    assert not any(len(prompt.scaled_boxes) for prompt in segmenter.seen[0])
    assert all(prompt.point_coords is not None for prompt in segmenter.seen[0][1:])
    alone = segment(Ellipse(), samples[:1], [segmenter.seen[0][1:]])[0]
    merged = candidates[1][0]
    # The ellipse in the first of three nested boxes agrees best with the jittered one and the middle one.
    assert np.array_equal(merged.masks, alone[0].masks)
    masks = [alone[1].masks[0], alone[2].masks[0], alone[0].jittered_masks[0]]
    assert np.array_equal(merged.jittered_masks, masks), "the others vote, too"
    (without,) = segment(Ellipse(), samples[:1], [[replace(several, jittered_boxes=jittered[:0])]])[0]
    assert np.array_equal(without.masks, alone[1].masks), "the middle one, as nothing speaks for the first"


def candidate_of(*rows: str, score: float = np.nan) -> Candidate:
    masks = np.array([[[c == "#" for c in row] for row in rows]])
    scores = np.full(1, score, np.float32)
    return Candidate(masks, scores, scores + 1, None, masks[:0])


def test_the_mask_that_agrees_best_is_chosen_and_keeps_its_own_scores():
    a, b, c = candidate_of("##..", score=0.9), candidate_of("##..", score=0.3), candidate_of("####", score=0.99)
    assert merge_boxes([c, b, a]).predicted_iou == a.predicted_iou, "of equals the one with the higher predicted IoU"
    assert merge_boxes([c, b, b]).jittered_masks.sum(axis=(1, 2)).tolist() == [4, 2]
    assert merge_boxes([a]) is a


def test_of_two_boxes_the_first_is_chosen_unless_a_score_or_an_empty_mask_decides():
    left, right, empty = candidate_of("##.."), candidate_of(".##."), candidate_of("....")
    assert np.array_equal(merge_boxes([left, right]).masks, left.masks)
    assert np.array_equal(merge_boxes([empty, empty, right]).masks, empty.masks), "no two masks agree: the first"
    assert np.array_equal(merge_boxes([empty, right, right]).masks, right.masks)
    assert np.array_equal(merge_boxes([left, replace(right, predicted_iou=np.ones(1))]).masks, right.masks)
