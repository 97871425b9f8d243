"""The segmenter is asked once for the images that have prompts, and not at all for the others."""

from __future__ import annotations

import numpy as np

from kmine.records import Prompts, Sample
from kmine.segmenters.ellipse import Ellipse
from kmine.stages.segment import segment


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
