"""The oracle: rounds of mining with true masks, and the masks that it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG, record_steps, same, truth_of, weights

from kmine.data.pool import Pool
from kmine.errors import WithheldMaskError
from kmine.methods.oracle import REASON_PREFIX, oracle


def test_the_oracle_trains_on_true_masks_and_its_reasons_say_so(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    task, store = task_of(CFG)
    truth = truth_of(task)
    rounds = list(oracle(task, truth))
    assert steps == [12, 6, 6]
    assert [r.num_pseudo for r in rounds] == [0, len(truth), len(truth)]
    assert [r.reason.startswith(REASON_PREFIX) for r in rounds] == [False, True, True]
    assert not same(weights(store, 1, "oracle"), weights(store, 0))
    list(oracle(task, truth_of(task, truth.ids[:2])))
    assert steps[3:] == [6, 6], "other masks are another training"


def test_withheld_masks_and_images_of_another_split_are_refused(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    task, _ = task_of(replace(CFG, rounds=1))
    with pytest.raises(WithheldMaskError):
        oracle(task, task.unlabeled)
    with pytest.raises(ValueError, match="1 of another split"):
        oracle(task, Pool(task.val._cache, task.val.ids[:1], task.val._groups, "true"))
    with pytest.raises(ValueError, match="got 0"):
        oracle(task, truth_of(task).subset([]))
    assert steps == []
