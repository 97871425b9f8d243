"""The segmenter is asked once for the images that have prompts, and not at all for the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kmine.mining.segment import segment, segment_twice
from kmine.segmenters.ellipse import Ellipse
from kmine.types import Prompts, Sample


class Counting(Ellipse):
    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    def encode(self, images):
        self.encoded.append(len(images))
        return super().encode(images)


def test_images_without_prompts_are_not_encoded_and_answers_stay_in_place():
    samples = [Sample(str(n), str(n), np.full((20, 30, 3), n, np.uint8)) for n in range(4)]
    prompts = [
        [],
        [Prompts(1, np.array([2, 2, 8, 8], np.float32))],
        [],
        [Prompts(1, np.array([0, 0, 29, 19], np.float32))] * 2,
    ]
    segmenter = Counting()
    answers = segment(segmenter, samples, prompts)
    assert [len(a) for a in answers] == [0, 1, 0, 2]
    assert segmenter.encoded == [2]
    assert answers[1][0].masks.sum() < answers[3][0].masks.sum()


def test_nothing_to_ask_is_fine():
    samples = [Sample("a", "a", np.zeros((5, 5, 3), np.uint8))]
    assert segment(Counting(), samples, [[]]) == [[]]


def box(*corners: float) -> Prompts:
    return Prompts(1, np.array(corners, np.float32))


def test_the_second_pass_asks_about_the_first_answer_on_embeddings_made_once():
    samples = [Sample(str(n), str(n), np.zeros((20, 30, 3), np.uint8)) for n in range(3)]
    segmenter, seen = Counting(), []

    def again(image, number, asked, answer):
        seen.append((image, number, int(answer.masks[answer.best].sum())))
        return replace(asked, box=asked.box + 5)

    prompts = [[box(2, 2, 8, 8)], [], [box(0, 0, 9, 9), box(1, 1, 4, 4)]]
    asked, answers = segment_twice(segmenter, samples, prompts, again)
    once = segment(segmenter, samples, prompts)
    moved = segment(segmenter, samples, asked)
    assert [(n, k) for n, k, _ in seen] == [(0, 0), (2, 0), (2, 1)] and segmenter.encoded == [2, 2, 2]
    assert [area for *_, area in seen] == [int(a.masks[a.best].sum()) for some in once for a in some]
    assert asked[2][1].box.tolist() == [6, 6, 9, 9]
    assert all(
        np.array_equal(a.masks, b.masks) for x, y in zip(answers, moved, strict=True) for a, b in zip(x, y, strict=True)
    )


class Fading(Ellipse):
    """Answers boxes that are right of column 10 with nothing."""

    def decode(self, embeddings, prompts):
        answers = super().decode(embeddings, prompts)
        for some, asked in zip(answers, prompts, strict=True):
            for k, one in enumerate(asked):
                if one.box[0] > 10:
                    some[k] = replace(some[k], masks=np.zeros_like(some[k].masks))
        return answers


def test_an_empty_second_answer_leaves_the_first_one():
    samples = [Sample("a", "a", np.zeros((20, 30, 3), np.uint8))]
    first = [[box(2, 2, 8, 8), box(3, 3, 9, 9)]]
    moves = (9.0, 1.0)
    asked, answers = segment_twice(
        Fading(), samples, first, lambda n, k, one, answer: replace(one, box=one.box + moves[k])
    )
    assert asked[0][0].box.tolist() == [2, 2, 8, 8] and asked[0][1].box.tolist() == [4, 4, 10, 10]
    assert all(answer.masks.any() for answer in answers[0])
