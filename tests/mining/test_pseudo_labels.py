"""Pseudo-labels of a round: ids, weights, reasons, and the pool that training reads."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG, decision

from kmine.feedback.verdict_effects import NO_VERDICTS
from kmine.io.files import encode_png
from kmine.mining.pseudo_labels import PseudoLabels, reviewed_labels
from kmine.types import PseudoLabel


@pytest.fixture
def task(task_of):
    return task_of(CFG)[0]


def labels_of(task, rows, round_idx: int = 1) -> PseudoLabels:
    return PseudoLabels(task, round_idx, "s", rows, {})


def estimated(task):
    return replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, pseudo_weight="estimated")))


def test_weights_are_mean_estimates_of_kept_objects_limited_to_one(task):
    a, b, c, d = task.unlabeled.ids[:4]
    rows = [
        decision(a, 0.4), decision(a, 0.8, object_idx=1), decision(a, 0.0, reason="low_agreement", object_idx=2),
        decision(b, float("nan")), decision(c, None, reason="lesion_free", object_idx=-1), decision(d, 1.2),
    ]  # fmt: skip
    assert labels_of(estimated(task), rows).pool.weights == {a: pytest.approx(0.6), d: 1.0}
    assert labels_of(task, rows).pool.weights == {}


def test_images_in_training_keep_the_order_of_the_pool(task):
    a, b, c = task.unlabeled.ids[:3]
    dropped = replace(decision(c, 0.9, reason="low_agreement"), in_training=False)
    rows = [decision(b, None, reason="lesion_free", object_idx=-1), dropped, decision(a, 0.5)]
    labels = labels_of(task, rows)
    assert list(labels) == [a, b] and labels.pool.ids == (a, b) and labels.pool.empty == {b}
    assert not labels.why_empty and len(labels_of(task, [dropped])) == 0
    assert labels_of(task, [dropped]).why_empty == "objects by the gate's reason: low_agreement 1"


def test_a_label_is_the_saved_mask_with_its_origin(task):
    sample_id = task.unlabeled.ids[0]
    mask = np.eye(*task.unlabeled.native_shape(sample_id), dtype=np.uint8)
    task.run.save_batch(2, "s", 0, [], [decision(sample_id, 0.5)], {sample_id: PseudoLabel(mask)})
    task.run.close_round(2, "s", 1)
    labels = labels_of(task, [decision(sample_id, 0.1, "low_agreement"), decision(sample_id, 0.5)], 2)
    label = labels[sample_id]
    assert (label.reason, label.weight, label.signature, label.round_idx) == ("kept", 0.5, "s", 2)
    assert np.array_equal(label.mask, mask) and not label.lesion_free
    assert np.array_equal(labels.pool.sample(sample_id).mask, mask)


def test_the_pool_reads_the_same_masks_in_another_process(task):
    """Batches are sent there with `fit.num_workers`, where processes are not forked."""
    sample_id = task.unlabeled.ids[0]
    mask = np.eye(*task.unlabeled.native_shape(sample_id), dtype=np.uint8)
    task.run.save_batch(1, "s", 0, [], [decision(sample_id, 0.5)], {sample_id: PseudoLabel(mask)})
    task.run.close_round(1, "s", 1)
    pool = pickle.loads(pickle.dumps(labels_of(task, [decision(sample_id, 0.5)]).pool))
    assert np.array_equal(pool.mask_native(sample_id), mask)


def test_reviewed_images_are_accepted_with_the_reviewers_mask_or_rejected(tmp_path):
    mask = np.array([[0, 1, 255]], np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(mask, "", 0))
    review = replace(NO_VERDICTS, rejected=frozenset("rx"), accepted={"a": tmp_path / "a.png"})
    rows, labels = reviewed_labels(review, ["a", "r"], "s", 3)
    assert [(row.sample_id, row.reason, row.kept, row.in_training) for row in rows] == [
        ("r", "rejected", False, False),
        ("a", "accepted", True, True),
    ]
    assert list(labels) == ["a"] and np.array_equal(labels["a"].mask, mask)
    assert (labels["a"].reason, labels["a"].weight, labels["a"].round_idx) == ("accepted", None, 3)
