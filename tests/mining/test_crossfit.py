"""Laws of cross-fitting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.small import CFG, record_steps, same, weights

from kmine.config import AdaptConfig
from kmine.methods import mining
from kmine.methods.mining import mine
from kmine.mining import candidates, crossfit
from kmine.mining.crossfit import (
    folds,
    num_objects,
    out_of_fold,
    part_models,
    remaining_labels,
    sample_ids,
    unlabeled_parts,
    validation_examples,
)
from kmine.training import rounds
from kmine.training.checkpoints import Checkpoints
from kmine.training.trainer import train

SMALL = replace(CFG, rounds=1, adapt=AdaptConfig(folds=2, fold_steps=6, max_images=2))


@pytest.fixture(autouse=True)
def _few_objects_are_enough(monkeypatch):
    monkeypatch.setattr(crossfit, "MIN_OBJECTS", 2)


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


def test_the_auxiliary_model_of_a_fold_begins_as_that_of_all_labels(task_of, monkeypatch):
    """So the classifier of image-level labels, which `new_model` trains for sks, is trained once for all folds."""
    task, store = task_of(replace(SMALL, model=replace(SMALL.model, name="unetpp+unet")))
    built, trained, real = [], [], (rounds.new_model, rounds.train)

    def train(own, *args, **kwargs):
        trained.append((own.labeled.ids, own.cfg.model.name, own.cfg.fit.steps))
        return real[1](own, *args, **kwargs)

    monkeypatch.setattr(rounds, "new_model", lambda own: built.append((own.signature, own.labeled)) or real[0](own))
    monkeypatch.setattr(rounds, "train", train)
    held_out = folds(task.labeled, 2, task.cfg.seed)[1]
    model = crossfit.fold_auxiliary_model(task, 1, held_out)
    assert built == [(task.signature, task.labeled)]
    assert trained == [(remaining_labels(task, held_out).ids, "unet", SMALL.adapt.fold_steps)]
    assert same(weights(store, 0, "witness_fold_1", "model"), model.state_dict())


def test_one_fold_gives_no_prompts_and_trains_nothing(task_of):
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, folds=1)))
    examples = list(out_of_fold(task, task.labeled.ids))
    assert [len(prompts) for _, prompts in examples] == [0] * len(task.labeled)
    assert not list(store.root.glob("fold_*"))


def test_labels_that_calibrate_no_gate_train_no_model_of_a_fold_either(task_of, monkeypatch):
    task, store = task_of(SMALL)
    monkeypatch.setattr(crossfit, "MIN_OBJECTS", num_objects(task.labeled) + 1)
    examples = list(out_of_fold(task, task.labeled.ids))
    assert [sample.sample_id for sample, _ in examples] == list(task.labeled.ids)
    assert not any(prompts for _, prompts in examples) and not list(store.root.glob("fold_*"))


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


# -- parts of the unlabeled images


def test_parts_partition_the_unlabeled_images_and_one_is_none(task_of):
    task, _ = task_of(replace(SMALL, crossfit=3))
    parts = unlabeled_parts(task)
    assert len(parts) == 3 and sorted(i for ids in parts for i in ids) == sorted(task.unlabeled.ids)
    assert unlabeled_parts(task_of(replace(SMALL, crossfit=1), "one")[0]) == []
    single = replace(task, unlabeled=task.unlabeled.subset(task.unlabeled.ids[:1]))
    assert unlabeled_parts(single) == [], "no model could be trained without a part"


@pytest.fixture
def adopting(monkeypatch):
    """Every round is adopted, whatever a few validation images say."""
    real = mining.evaluate_round
    monkeypatch.setattr(mining, "evaluate_round", lambda *a, **k: replace(real(*a, **k), adopted=True))


def test_from_round_2_on_no_image_is_predicted_by_a_model_trained_on_its_pseudo_mask(task_of, adopting, monkeypatch):
    task, store = task_of(replace(CFG, rounds=3, crossfit=2))
    trained_on, predicted = {}, []  # by weights: images with pseudo masks, those of earlier rounds included
    real_train, real_infer = train, candidates.infer_by_labels

    def key(weights):
        return float(sum(tensor.double().sum() for tensor in weights.values() if tensor.is_floating_point()))

    def recording(task, model, *, start=None, pseudo=None, **settings):
        made = real_train(task, model, start=start, pseudo=pseudo, **settings)
        before = trained_on[key(start.best)] if start else set()
        trained_on[key(made.best)] = before | set(pseudo.ids if pseudo else ())
        return made

    def inferring(model, pool, images, **settings):
        predicted.extend((key(model.state_dict()), image.sample_id) for image in images)
        return real_infer(model, pool, images, **settings)

    for module in (mining, crossfit):
        monkeypatch.setattr(module, "train", recording)
    monkeypatch.setattr(candidates, "infer_by_labels", inferring)
    results = list(mine(task))
    assert [r.num_pseudo > 0 for r in results] == [False, True, True, True]
    assert len(predicted) == 3 * len(task.unlabeled) and not any(i in trained_on[model] for model, i in predicted)
    assert len({model for model, _ in predicted}) == 1 + 2 + 2, "round 0's student, then a model of each part"
    folders = sorted(path.relative_to(store.root).as_posix() for path in store.root.glob("part_*/round_*"))
    assert folders == [f"part_{part}/round_0{n}" for part in (0, 1) for n in (1, 2)], "none after the last round"
    assert all(result.seconds.get("parts", 0) > 0 for result in results[2:]) and "parts" not in results[1].seconds
    steps = record_steps(monkeypatch)
    again = list(mine(task))
    assert [r.metrics for r in again] == [r.metrics for r in results] and steps == [], "read back"


def test_a_lost_part_is_trained_again_as_before(task_of, adopting, monkeypatch):
    task, store = task_of(replace(CFG, rounds=2, crossfit=2))
    list(mine(task))
    path = store.round_dir(1, "part_1") / "model.safetensors"
    before, rows = weights(store, 1, "part_1", "model"), str(list(store.decisions(2)))
    path.unlink()
    steps = record_steps(monkeypatch)
    list(mine(task))
    assert steps == [CFG.fit.round_steps] and same(before, weights(store, 1, "part_1", "model"))
    assert str(list(store.decisions(2))) == rows


def test_round_1_and_the_student_of_all_images_are_those_without_parts(task_of, adopting):
    runs = [task_of(replace(CFG, rounds=2, crossfit=n), f"run{n}") for n in (1, 2)]
    for task, _ in runs:
        list(mine(task))
    (_, one), (_, two) = runs
    assert same(weights(one, 1), weights(two, 1)) and one.round_signature(1) == two.round_signature(1)
    assert one.round_signature(2) != two.round_signature(2)
    student = Checkpoints("student", {}, {}, 0.0)
    assert part_models(task, student, [student, student]) == ()
