"""The identity segmenter returns the component of its prompts."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.segmenters import SEGMENTERS
from kmine.segmenters.identity import IdentitySegmenter
from kmine.types import Prompts

PART = np.zeros((8, 9), np.bool_)
PART[2:5, 3:7] = True
BOX = np.array([0, 0, 8, 7], np.float32)
SEGMENTER = IdentitySegmenter()
EMBEDDINGS = SEGMENTER.encode([np.zeros((8, 9, 3), np.uint8)])


def test_the_component_is_the_candidate_whatever_the_box() -> None:
    ((candidate,),) = SEGMENTER.decode(EMBEDDINGS, [[Prompts(1, BOX, jittered_boxes=BOX[None], component=PART)]])
    np.testing.assert_array_equal(candidate.masks, PART[None])
    assert candidate.best == 0
    assert np.isnan(candidate.predicted_iou).all() and np.isnan(candidate.stability_score).all()
    assert candidate.jittered_masks.shape == (0, 8, 9)


def test_prompts_without_a_component_are_refused() -> None:
    with pytest.raises(ValueError, match="component"):
        SEGMENTER.decode(EMBEDDINGS, [[Prompts(1, BOX)]])


def test_its_name_is_no_choice_of_the_settings() -> None:
    assert SEGMENTER.name not in SEGMENTERS.names()
