"""Which images teach, and what they weigh."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG

from kmine.mining.pseudo_labels import pseudo_label_weights, pseudo_labeled_pool


def decision(sample_id, estimated, reason="kept", object_idx=0):
    kept = reason in ("kept", "lesion_free")
    row = {"sample_id": sample_id, "object_idx": object_idx, "kept": kept, "reason": reason, "in_training": True}
    return {**row, "estimated_dice": estimated}


def test_weights_are_the_mean_estimate_of_the_kept_objects():
    rows = [
        decision("a", 0.4), decision("a", 0.8, object_idx=1), decision("a", 0.0, reason="low_agreement", object_idx=2),
        decision("b", float("nan")), decision("c", None, reason="lesion_free", object_idx=-1), decision("d", 1.2),
    ]  # fmt: skip
    assert pseudo_label_weights(rows) == {"a": pytest.approx(0.6), "d": 1.0}


def test_pseudo_masks_come_with_their_weights_where_asked_and_with_what_is_known_to_be_empty(task_of):
    task, _store = task_of(CFG)
    a, b, c = task.unlabeled.ids[:3]
    out = {**decision(c, 0.9, reason="low_agreement"), "in_training": False}
    rows = [decision(a, 0.5), decision(b, None, reason="lesion_free", object_idx=-1), out]
    plain = pseudo_labeled_pool(task, 1, rows)
    assert (plain.ids, plain.weights, plain.empty) == ((a, b), {}, {b})
    estimated = replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, pseudo_weight="estimated")))
    weighed = pseudo_labeled_pool(estimated, 1, rows)
    assert (weighed.ids, weighed.weights, weighed.empty) == ((a, b), {a: 0.5}, {b})
