"""Laws of the adapted segmenter as an artifact of the run."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG, build_task

from kmine.config import AdaptConfig
from kmine.methods.mining import mine
from kmine.mining.adaptation import step
from kmine.mining.adaptation.step import adapt_segmenter, adaptation_summary
from kmine.segmenters.base import FineTuneDefaults
from kmine.segmenters.ellipse import Ellipse

SMALL = replace(CFG, rounds=1, adapt=AdaptConfig(folds=2, fold_steps=6, steps=4, batch_size=2, lr=0.1, val_every=2))


class Shrunk(Ellipse):
    """An ellipse in a box scaled by its one weight; fine-tuning moves the weight to `goal`."""

    fine_tune_defaults = FineTuneDefaults(steps=4, batch_size=2, lr=0.1)

    def __init__(self, weight: float = 0.3, goal: float = 1.0, name: str = "shrunk") -> None:
        super().__init__()
        self.weight, self.goal, self.name, self.num_steps = weight, goal, name, 0

    @property
    def signature(self) -> str:
        return f"shrunk {self.weight}"

    def decode(self, embeddings, prompts):
        def scaled(prompt):
            centre = np.tile((prompt.box[:2] + prompt.box[2:]) / 2, 2)
            return replace(prompt, box=centre + self.weight * (prompt.box - centre))

        return super().decode(embeddings, [[scaled(prompt) for prompt in of_image] for of_image in prompts])

    def fine_tuner(self):
        return ShrunkTuner(self)

    def with_weights(self, state):
        return Shrunk(float(state["weight"]), self.goal, self.name + "+adapted")


class ShrunkTuner:
    def __init__(self, segmenter: Shrunk) -> None:
        self.segmenter, self.weight = segmenter, torch.nn.Parameter(torch.tensor(segmenter.weight))

    def parameters(self):
        return [self.weight]

    def loss(self, examples, seed):
        self.segmenter.num_steps += 1
        return (self.weight - self.segmenter.goal) ** 2

    def state(self):
        return {"weight": self.weight.detach().clone()}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(task with the adapted segmenter, run folder)."""
    task, store = build_task(tmp_path_factory.mktemp("adapted"), SMALL, segmenter=Shrunk())
    return adapt_segmenter(task), store


@pytest.fixture
def again(adapted, copy_of):
    """Of a segmenter: (task with it as it was given, copy of the run folder)."""

    def build(given: Shrunk):
        task, store = copy_of(adapted)
        return replace(task, segmenter=given), store

    return build


def test_the_adapted_segmenter_mines_and_is_an_artifact(adapted, copy_of):
    task, store = copy_of(adapted)
    assert task.segmenter.name == "shrunk+adapted"
    assert task.segmenter.weight > Shrunk().weight
    record = store.read_json(store.root / "segmenter" / "adaptation.json")
    assert record["used"] and record["iou_after"] > record["iou_before"]
    assert f"{record['iou_before']:.3f} -> {record['iou_after']:.3f}" in task.progress.said[-1]
    list(mine(task))
    assert store.decisions(1)


def test_a_finished_adaptation_is_read_back(adapted, again):
    given = Shrunk()
    task, _store = again(given)
    second = adapt_segmenter(task)
    assert given.num_steps == 0
    assert second.segmenter.signature == adapted[0].segmenter.signature != given.signature


def test_lost_weights_or_another_segmenter_are_fine_tuned_again(again):
    given = Shrunk()
    task, store = again(given)
    (store.root / "segmenter" / "adapted.safetensors").unlink()
    adapt_segmenter(task)
    assert given.num_steps == SMALL.adapt.steps
    other = Shrunk(0.4)
    adapt_segmenter(replace(task, segmenter=other))
    assert other.num_steps == SMALL.adapt.steps


def test_a_segmenter_that_gains_too_little_stays_as_it_was(again):
    given = Shrunk()
    task, store = again(given)
    shutil.rmtree(store.root / "segmenter")
    task = replace(task, cfg=replace(SMALL, data=task.cfg.data, adapt=replace(SMALL.adapt, min_gain=0.9)))
    task.progress.said.clear()
    assert adapt_segmenter(task).segmenter is given
    assert adapt_segmenter(task).segmenter is given, "read back"
    assert [said for said in task.progress.said if "adapted" in said] == task.progress.said[-1:]
    assert "not used" in task.progress.said[-1]
    assert not (store.root / "segmenter" / "adapted.safetensors").exists()


def test_switched_off_or_not_fine_tunable_leaves_no_trace(task_of):
    task, store = task_of(replace(SMALL, adapt=replace(SMALL.adapt, enabled=False)), segmenter=Shrunk())
    assert adapt_segmenter(task) is task
    plain, other = task_of(SMALL, "other", segmenter=Ellipse())
    assert adapt_segmenter(plain) is plain
    assert not (store.root / "segmenter").exists() and not (other.root / "segmenter").exists()


def test_at_most_max_images_are_used(task_of, monkeypatch):
    counts, adapt = [], step.adapt

    def counting(segmenter, train, held_out, *args, **kwargs):
        counts.extend((len(train), len(held_out)))
        return adapt(segmenter, train, held_out, *args, **kwargs)

    monkeypatch.setattr(step, "adapt", counting)
    task, _ = task_of(replace(SMALL, adapt=replace(SMALL.adapt, max_images=2)), segmenter=Shrunk())
    adapt_segmenter(task)
    assert counts == [2, 2]


def test_the_summary_names_missing_objects():
    assert "hold no object" in adaptation_summary({"base": "tiny", "num_objects": 0, "num_held_out": 3})
