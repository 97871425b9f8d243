"""Self-training is mining with the local model's own masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers.small import CFG, same, weights

from kmine.data.person_prompts import PersonPrompts
from kmine.methods import self_training as module
from kmine.methods.mining import mine
from kmine.methods.self_training import self_training
from kmine.ops.masks import from_rle
from kmine.segmenters.identity import IdentitySegmenter
from kmine.types import Prompts

ONE = replace(CFG, rounds=1)


def test_pseudo_masks_are_the_local_models_own(task_of):
    task, store = task_of(ONE)
    rounds = list(self_training(task))
    rows = [row for row in store.decisions(1) if row.is_object]
    assert rounds[1].num_pseudo > 0 and rows
    assert all(row.local_rle == row.segmenter_rle and row.evidence.agreement_iou == 1 for row in rows)
    for sample_id in {row.sample_id for row in rows}:
        own = np.any([from_rle(r.local_rle, r.height, r.width) for r in rows if r.sample_id == sample_id], 0)
        assert np.array_equal(store.pseudo_mask(1, sample_id) == 1, own)


def test_it_is_mining_with_the_identity_segmenter_whatever_the_prompts(task_of):
    task, store = task_of(replace(ONE, prompts=replace(CFG.prompts, source="auto", passes=2)))
    drawn = Prompts(1, np.array([1, 1, 30, 30], np.float32), origin="person")
    rounds = list(self_training(replace(task, person=PersonPrompts(dict.fromkeys(task.unlabeled.ids, (drawn,))))))
    other, other_store = task_of(ONE, "identity", segmenter=IdentitySegmenter())
    assert [r.metrics for r in rounds] == [r.metrics for r in mine(other)]
    assert same(weights(store, 1), weights(other_store, 1))


def test_a_calibrated_gate_is_calibrated_with_the_identity_segmenter(task_of, monkeypatch):
    task, _ = task_of(replace(ONE, gate=replace(CFG.gate, mode="calibrated")))
    pairs = []
    monkeypatch.setattr(module, "calibrate", lambda task, base: pairs.append((task.segmenter, base)) or task)
    self_training(task)
    ((segmenter, base),) = pairs
    assert segmenter is base and isinstance(segmenter, IdentitySegmenter)
