"""Mining with an echo for a segmenter is self-training: its masks are the local model's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG

from kmine.methods.mining import mine
from kmine.ops.masks import from_rle
from kmine.segmenters import SEGMENTERS
from kmine.segmenters.identity import IdentitySegmenter
from kmine.types import Prompts


def test_the_echo_answers_with_the_component_whatever_is_asked():
    part = np.zeros((8, 9), bool)
    part[2:5, 3:7] = True
    echo = IdentitySegmenter()
    embedded = echo.encode([np.zeros((8, 9, 3), np.uint8)])
    asked = Prompts(1, box=np.array([0, 0, 8, 7], np.float32), component=part)
    ((answer,),) = echo.decode(embedded, [[asked]])
    assert np.array_equal(answer.masks, part[None]) and answer.best == 0
    assert np.isnan(answer.predicted_iou).all() and np.isnan(answer.stability_score).all()
    assert answer.jittered_masks.shape == (0, 8, 9)
    with pytest.raises(ValueError, match="component"):
        echo.decode(embedded, [[Prompts(1, box=np.array([0, 0, 8, 7], np.float32))]])
    assert IdentitySegmenter.name not in SEGMENTERS.names(), "the lack of a segmenter is no segmenter to choose"


def test_its_pseudo_masks_are_the_local_model_s_own(task_of):
    task, store = task_of(replace(CFG, rounds=1), segmenter=IdentitySegmenter())
    done = list(mine(task))
    rows = [row for row in store.decisions(1) if row.is_object]
    assert done[1].num_pseudo > 0 and rows
    assert all(row.local_rle == row.segmenter_rle and row.evidence.agreement_iou == 1 for row in rows)
    for sample_id in {row.sample_id for row in rows}:
        own = np.any([from_rle(r.local_rle, r.height, r.width) for r in rows if r.sample_id == sample_id], 0)
        assert np.array_equal(store.pseudo_mask(1, sample_id) == 1, own)
