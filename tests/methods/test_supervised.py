"""The supervised baseline, and the two methods on unlabeled images that reduce to it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
from helpers.small import CFG, record_steps, same, weights

from kmine.config import FixmatchConfig, TeacherConfig, UnimatchConfig
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.methods.fixmatch import fixmatch
from kmine.methods.mean_teacher import mean_teacher
from kmine.methods.supervised import labels_only, supervised, supervised_once
from kmine.methods.unimatch import unimatch
from kmine.segmenters.identity import IdentitySegmenter
from kmine.training.checkpoints import Checkpointer

ONE = replace(CFG, rounds=1)
LOW_THRESHOLD = {"fixmatch": FixmatchConfig(threshold=0.5), "unimatch": UnimatchConfig(threshold=0.5)}
"""After a few steps a model has no higher confidence."""


@contextmanager
def stopped_at_its_first_state(monkeypatch):
    """Within the block a training is killed when it has saved a state."""
    real = Checkpointer.save_state

    def save_and_stop(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpointer, "save_state", save_and_stop)
        yield


@pytest.mark.parametrize("method", [fixmatch, mean_teacher, unimatch])
def test_equal_steps_from_one_round_0_without_masks_or_labels(task_of, monkeypatch, method):
    steps, labels_read, real = record_steps(monkeypatch), [], Pool.image_label
    monkeypatch.setattr(Pool, "image_label", lambda pool, i: (labels_read.append(i), real(pool, i))[1])
    task, store = task_of(replace(CFG, **LOW_THRESHOLD), segmenter=IdentitySegmenter())
    assert task.unlabeled._masks == "withheld"
    rounds, counted = list(method(task)), list(steps)
    assert not labels_read and counted == [12, 6, 6] and [r.round_idx for r in rounds] == [0, 1, 2]
    baseline = list(supervised(task))
    assert steps[3:] == [6, 6], "round 0 is shared"
    assert rounds[0].metrics == baseline[0].metrics and all(r.num_pseudo == 0 for r in rounds)
    method_dir = method.__name__
    assert not same(weights(store, 1, method_dir), weights(store, 1, "supervised")), "unlabeled images have an effect"


@pytest.mark.parametrize(
    ("method", "off"),
    [
        (fixmatch, {"fixmatch": FixmatchConfig(0.0)}),
        (mean_teacher, {"teacher": TeacherConfig(0.0)}),
        (unimatch, {"unimatch": UnimatchConfig(0.0)}),
    ],
)
def test_with_weight_0_the_training_is_supervised_bit_for_bit(task_of, method, off):
    task, store = task_of(replace(ONE, **off))
    last = [list(m(task))[-1] for m in (method, supervised)]
    assert last[0].metrics == last[1].metrics
    for name in ("model", "model_final"):
        assert same(weights(store, 1, method.__name__, name), weights(store, 1, "supervised", name))


@pytest.mark.parametrize("method", [fixmatch, mean_teacher, unimatch])
def test_an_interrupted_method_resumes_bit_for_bit(task_of, monkeypatch, method):
    cfg = replace(ONE, fit=replace(CFG.fit, steps=4, round_steps=4, val_every=2), **LOW_THRESHOLD)
    task, store = task_of(cfg)
    list(method(task))
    other, other_store = task_of(cfg, "interrupted")
    rounds = method(other)
    next(rounds)
    with stopped_at_its_first_state(monkeypatch):
        next(rounds)
    assert (other_store.round_dir(1, method.__name__) / "fit_state.safetensors").exists()
    list(method(other))
    for name in ("model", "model_final"):
        assert same(weights(store, 1, method.__name__, name), weights(other_store, 1, method.__name__, name))


def test_a_changed_setting_affects_only_the_training_of_its_method(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    task, _ = task_of(replace(ONE, **LOW_THRESHOLD))
    for method in (fixmatch, mean_teacher):
        list(method(task))
    steps.clear()
    other = replace(task, cfg=replace(task.cfg, fixmatch=FixmatchConfig(threshold=0.5, cutmix=0.9)))
    list(mean_teacher(other))
    assert steps == []
    list(fixmatch(other))
    assert steps == [6]


@pytest.mark.parametrize("method", [fixmatch, mean_teacher, unimatch])
def test_without_room_for_unlabeled_images_nothing_is_trained(task_of, monkeypatch, method):
    steps = record_steps(monkeypatch)
    task, _ = task_of(replace(ONE, fit=replace(CFG.fit, labeled_share=1.0)))
    with pytest.raises(UserError, match=r"fit\.labeled_share"):
        list(method(task))
    assert steps == []


def test_one_schedule_has_the_steps_of_all_rounds_and_resumes_bit_for_bit(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    task, store = task_of(replace(CFG, fit=replace(CFG.fit, val_every=4)))
    (result,) = supervised_once(task)
    assert steps == [24] and result.retrained and result.adopted and result.round_idx == 2
    assert not (store.round_dir(0) / "model.safetensors").exists(), "from the initial weights"
    other, other_store = task_of(task.cfg, "interrupted")
    with stopped_at_its_first_state(monkeypatch):
        list(supervised_once(other))
    assert next(supervised_once(other)).metrics == result.metrics
    assert same(weights(store, 2, "supervised_once"), weights(other_store, 2, "supervised_once"))
    without = replace(task, cfg=replace(task.cfg, rounds=0))
    assert [r.metrics for r in supervised_once(without)] == [r.metrics for r in supervised(without)]


@pytest.mark.parametrize("method", [supervised, fixmatch])
def test_methods_on_unlabeled_images_are_retrained_too(task_of, monkeypatch, method):
    steps = record_steps(monkeypatch)
    task, _store = task_of(replace(CFG, retrain=True, **LOW_THRESHOLD))
    rounds = list(method(task))
    assert steps == ([12, 6, 6] if method is supervised else [12, 6, 6, 24])
    assert [r.round_idx for r in rounds if r.retrained] == ([] if method is supervised else [3])


def test_a_baseline_model_has_all_its_rounds_in_a_folder_of_its_own(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    task, store = task_of(ONE)
    rounds = list(labels_only(task, "unet"))
    assert [r.round_idx for r in rounds] == [0, 1] and steps == [12, 6]
    assert not (store.round_dir(0) / "model.safetensors").exists()
    list(labels_only(task, "unet"))
    assert steps == [12, 6], "read back"
    same_network = labels_only(task, task.cfg.model.name)
    own = list(supervised(task))
    assert [r.metrics for r in same_network] == [r.metrics for r in own], "the same labels, steps and seed"
