"""The public suite finds what it looks for, and the example of docs/segmenters.md passes it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kmine.config import SegmenterConfig
from kmine.segmenters.base import Abilities
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.testing import SegmenterSuite

DOCS = Path(__file__).resolve().parents[2] / "docs" / "segmenters.md"
EXAMPLE, TEST = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
NAMES: dict = {}
exec(compile(EXAMPLE, str(DOCS), "exec"), NAMES)
exec(compile(TEST, str(DOCS), "exec"), NAMES)


class TestExample(NAMES["TestBright"]):
    """The test of the documentation, as pytest runs it."""


def test_the_example_is_short_and_looks_at_the_image() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 33
    image = np.zeros((9, 9, 3), np.uint8)
    image[2:4, 3:6] = 200
    segmenter = NAMES["Bright"](SegmenterConfig(), "cpu", True, print)
    from kmine.segmenters.testing import box_prompts

    ((candidate,),) = segmenter.decode(segmenter.encode([image]), [box_prompts((1, 1, 7, 7))])
    np.testing.assert_array_equal(candidate.masks[0], image[..., 0] > 0)


class Boasting(Ellipse):
    """Declares that it predicts no IoU, and does."""

    abilities = Abilities(predicted_iou=False)

    def decode(self, embeddings, prompts):
        scored = super().decode(embeddings, prompts)
        return [[replace(row, predicted_iou=np.ones(1, np.float32)) for row in rows] for rows in scored]


class Shifting(Ellipse):
    """Masks depend on the number of images at once."""

    def decode(self, embeddings, prompts):
        rows = super().decode(embeddings, prompts)
        return [[replace(row, masks=np.roll(row.masks, len(prompts), 2)) for row in of_image] for of_image in rows]


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Boasting(), SegmenterSuite.test_what_it_lacks_has_no_effect),
        (Shifting(), SegmenterSuite.test_images_decode_alike_together_and_one_by_one),
    ],
)
def test_a_segmenter_that_breaks_a_law_fails(wrong, law) -> None:
    with pytest.raises(AssertionError):
        law(SegmenterSuite(), wrong)
    law(SegmenterSuite(), Ellipse())
