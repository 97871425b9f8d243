"""Laws of cross-fitting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.small import CFG, weights

from kmine.config import AdaptConfig
from kmine.mining import crossfit
from kmine.mining.crossfit import folds, out_of_fold, remaining_labels, sample_ids, validation_examples

SMALL = replace(CFG, rounds=1, adapt=AdaptConfig(folds=2, fold_steps=6, max_images=2))


@pytest.mark.parametrize("num_folds", [2, 3, 5, 100])
def test_folds_partition_the_pool_by_group(task_of, num_folds):
    task, _ = task_of(SMALL)
    fold_ids = folds(task.labeled, num_folds, seed=0)
    assert sorted(i for ids in fold_ids for i in ids) == sorted(task.labeled.ids)
    assert len(fold_ids) == min(num_folds, len(task.labeled))
    groups = [{task.labeled.group_of(i) for i in ids} for ids in fold_ids]
    assert sum(map(len, groups)) == len(set.union(*groups)), "a group lies in two folds"
    assert max(map(len, fold_ids)) - min(map(len, fold_ids)) <= 1
    assert fold_ids == folds(task.labeled, num_folds, seed=0) != folds(task.labeled, num_folds, seed=1)
    assert sorted([*remaining_labels(task, fold_ids[0]).ids, *fold_ids[0]]) == sorted(task.labeled.ids)


def test_no_labeled_image_is_prompted_by_a_model_trained_on_it(task_of, monkeypatch):
    task, _ = task_of(SMALL)
    trained_on, train = [], crossfit.train

    def recording(fold_task, *args, **kwargs):
        trained_on.append(set(fold_task.labeled.ids))
        return train(fold_task, *args, **kwargs)

    monkeypatch.setattr(crossfit, "train", recording)
    prompted = []
    for sample, _ in out_of_fold(task, task.labeled.ids):
        assert sample.sample_id not in trained_on[-1]
        prompted.append(sample.sample_id)
    assert sorted(prompted) == sorted(task.labeled.ids)
    assert all(ids < set(task.labeled.ids) for ids in trained_on) and len(trained_on) == 2


def test_fold_models_differ(task_of):
    task, store = task_of(SMALL)
    list(out_of_fold(task, task.labeled.ids))
    first, second = (weights(store, 0, f"fold_{n}") for n in range(2))
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_one_fold_gives_no_prompts_and_trains_nothing(task_of):
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, folds=1)))
    examples = list(out_of_fold(task, task.labeled.ids))
    assert [len(prompts) for _, prompts in examples] == [0] * len(task.labeled)
    assert not list(store.root.glob("fold_*"))


def test_only_requested_images_are_returned(task_of):
    task, _ = task_of(SMALL)
    ids = task.labeled.ids[:1]
    assert [sample.sample_id for sample, _ in out_of_fold(task, ids)] == list(ids)


def test_validation_examples_are_limited_and_prompted_by_round_0(task_of):
    task, store = task_of(SMALL)
    examples = validation_examples(task)
    assert len(examples) == 2 and {sample.sample_id for sample, _ in examples} <= set(task.val.ids)
    assert weights(store, 0) and not list(store.root.glob("fold_*"))
    assert all(len(prompt.jittered_boxes) == 0 for _, prompts in examples for prompt in prompts)


def test_images_with_an_object_are_preferred(task_of):
    task, _ = task_of(replace(SMALL, data=replace(SMALL.data, kind="ct", num_samples=60)))
    pool = task.labeled
    with_object = [i for i in pool.ids if pool.mask_resized(i).any()]
    assert 2 <= len(with_object) < len(pool), "the phantom must hold both kinds"
    for seed in range(3):
        fewer = sample_ids(pool, len(with_object) - 1, seed)
        assert set(fewer) < set(with_object)
        more = sample_ids(pool, len(with_object) + 1, seed)
        assert set(with_object) < set(more) or len(with_object) + 1 >= len(pool)
    assert sample_ids(pool, len(pool), 0) == list(pool.ids)
