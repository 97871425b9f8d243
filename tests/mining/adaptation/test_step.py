"""Laws of cross-fitting and of the adapted segmenter as an artifact of the run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG, weights

from kmine.config import AdaptConfig
from kmine.methods.mining import mine
from kmine.mining import crossfit
from kmine.mining.adaptation import step as adaptation
from kmine.mining.adaptation.step import adapt_segmenter, adaptation_summary
from kmine.mining.crossfit import folds, out_of_fold
from kmine.segmenters.base import FineTuneDefaults
from kmine.segmenters.ellipse import Ellipse

SMALL = replace(CFG, rounds=1, adapt=AdaptConfig(folds=2, fold_steps=6, steps=4, batch_size=2, lr=0.1, val_every=2))


class Shrunk(Ellipse):
    """An ellipse in a box shrunk by its one weight, which learns to be 1."""

    fine_tune_defaults = FineTuneDefaults(steps=4, batch_size=2, lr=0.1)

    def __init__(self, weight: float = 0.3, goal: float = 1.0, name: str = "shrunk") -> None:
        super().__init__()
        self.weight, self.goal, self.name, self.taught = weight, goal, name, 0

    @property
    def signature(self) -> str:
        return f"shrunk {self.weight}"

    def decode(self, embeddings, prompts):
        def shrunk(one):
            middle = (one.box[:2] + one.box[2:]) / 2
            return replace(one, box=np.tile(middle, 2) + self.weight * (one.box - np.tile(middle, 2)))

        return super().decode(embeddings, [[shrunk(one) for one in asked] for asked in prompts])

    def fine_tuner(self):
        return Pupil(self)

    def with_weights(self, state):
        return Shrunk(float(state["weight"]), self.goal, self.name + "+adapted")


class Pupil:
    def __init__(self, of: Shrunk) -> None:
        self.of, self.weight = of, torch.nn.Parameter(torch.tensor(of.weight))

    def parameters(self):
        return [self.weight]

    def loss(self, lessons, seed):
        self.of.taught += 1
        return (self.weight - self.of.goal) ** 2

    def state(self):
        return {"weight": self.weight.detach().clone()}


@pytest.mark.parametrize("num_folds", [2, 3, 5, 100])
def test_folds_part_the_pool_by_group(task_of, num_folds):
    task, _ = task_of(SMALL)
    parts = folds(task.labeled, num_folds, seed=0)
    assert sorted(i for part in parts for i in part) == sorted(task.labeled.ids)
    assert len(parts) == min(num_folds, len(task.labeled))
    groups = [{task.labeled.group_of(i) for i in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)), "a group lies in two folds"
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == folds(task.labeled, num_folds, seed=0) != folds(task.labeled, num_folds, seed=1)


def test_no_labeled_image_is_prompted_by_a_model_that_was_trained_on_it(task_of, monkeypatch):
    task, _store = task_of(SMALL)
    trained_on, real = [], crossfit.train
    monkeypatch.setattr(
        crossfit, "train", lambda t, *a, **k: (trained_on.append(set(t.labeled.ids)), real(t, *a, **k))[1]
    )
    seen = []
    for sample, _ in out_of_fold(task, task.labeled.ids):
        assert sample.sample_id not in trained_on[-1]
        seen.append(sample.sample_id)
    assert sorted(seen) == sorted(task.labeled.ids)
    assert all(one < set(task.labeled.ids) for one in trained_on) and len(trained_on) == 2


def test_fold_models_differ_from_the_model_of_round_0(task_of):
    task, store = task_of(SMALL)
    list(out_of_fold(task, task.labeled.ids))
    first, second = (weights(store, 0, f"fold_{n}") for n in range(2))
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_one_fold_gives_no_prompts_and_trains_nothing(task_of):
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, folds=1)))
    examples = list(out_of_fold(task, task.labeled.ids))
    assert [len(prompts) for _, prompts in examples] == [0] * len(task.labeled)
    assert not list(store.root.glob("fold_*"))


def test_only_wanted_images_come_back(task_of):
    task, _store = task_of(SMALL)
    wanted = task.labeled.ids[:1]
    assert [sample.sample_id for sample, _ in out_of_fold(task, wanted)] == list(wanted)


def test_the_adapted_segmenter_mines_and_is_an_artifact(task_of):
    given = Shrunk()
    task, store = task_of(SMALL, segmenter=given)
    adapted = adapt_segmenter(task)
    assert adapted.segmenter.name == "shrunk+adapted"
    assert adapted.segmenter.weight > given.weight
    about = store.read_json(store.root / "segmenter" / "adaptation.json")
    assert about["used"] and about["iou_after"] > about["iou_before"]
    assert f"{about['iou_before']:.3f} -> {about['iou_after']:.3f}" in task.progress.said[-1]
    list(mine(adapted))
    assert store.decisions(1)


def test_it_is_read_back_and_not_taught_again(task_of):
    given = Shrunk()
    task, _store = task_of(SMALL, segmenter=given)
    first = adapt_segmenter(task)
    taught = given.taught
    second = adapt_segmenter(task)
    assert given.taught == taught > 0
    assert second.segmenter.signature == first.segmenter.signature != given.signature


def test_lost_weights_or_another_segmenter_teach_anew(task_of):
    given = Shrunk()
    task, store = task_of(SMALL, segmenter=given)
    adapt_segmenter(task)
    taught = given.taught
    (store.root / "segmenter" / "adapted.safetensors").unlink()
    adapt_segmenter(task)
    assert given.taught == 2 * taught
    other = Shrunk(0.4)
    adapt_segmenter(replace(task, segmenter=other))
    assert other.taught == taught


def test_a_segmenter_that_gains_too_little_stays_as_it_was_and_says_so(task_of):
    given = Shrunk()
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, min_gain=0.9)), segmenter=given)
    assert adapt_segmenter(task).segmenter is given
    assert adapt_segmenter(task).segmenter is given, "read back"
    assert "not used" in task.progress.said[-1] and len(task.progress.said) == 1
    assert not (store.root / "segmenter" / "adapted.safetensors").exists()


def test_switched_off_or_not_adaptable_leaves_no_trace(task_of):
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, enabled=False)), segmenter=Shrunk())
    assert adapt_segmenter(task) is task
    plain, other = task_of(SMALL, "other", segmenter=Ellipse())
    assert adapt_segmenter(plain) is plain
    assert not (store.root / "segmenter").exists() and not (other.root / "segmenter").exists()


def test_at_most_max_images_are_used(task_of, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        adaptation, "adapt", lambda s, train, held_out, *a, **k: seen.update(n=(len(train), len(held_out)))
    )
    task, _store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, max_images=2)), segmenter=Shrunk())
    with pytest.raises(AttributeError):  # the fake returns nothing
        adapt_segmenter(task)
    assert seen["n"] == (2, 2)


def test_of_too_many_images_those_with_an_object_come_first(task_of):
    task, _ = task_of(replace(SMALL, data=replace(SMALL.data, kind="ct", num_samples=60)))
    pool = task.labeled
    filled = [i for i in pool.ids if pool.mask_resized(i).any()]
    assert 2 <= len(filled) < len(pool), "both kinds are needed here"
    for seed in range(3):
        fewer = crossfit.sample_ids(pool, len(filled) - 1, seed)
        assert set(fewer) < set(filled)
        assert set(filled) < set(crossfit.sample_ids(pool, len(filled) + 1, seed)) or len(filled) + 1 >= len(pool)
    assert crossfit.sample_ids(pool, len(pool), 0) == list(pool.ids)


def test_the_sentence_names_what_was_missing():
    assert "hold no object" in adaptation_summary({"base": "tiny", "num_objects": 0, "num_held_out": 3})
