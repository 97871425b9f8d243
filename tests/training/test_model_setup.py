"""The model before its first step: the same for the same seed; sks with a classifier that is trained once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.small import CFG, same

from kmine.config import ClassifierConfig, ModelConfig
from kmine.training import classifier
from kmine.training.model_setup import new_model

SKS = replace(
    CFG,
    data=replace(CFG.data, kind="ct", num_samples=30, size=64),
    model=ModelConfig(name="sks", encoder="mobilenetv3_small_050", decoder_channels=8, levels=3),
    classifier=ClassifierConfig(steps=2, batch_size=4),
)


def test_the_classifier_of_sks_is_trained_once_and_read_back(task_of, monkeypatch):
    task, run = task_of(SKS)
    seen, real = [], classifier.fit_classifier
    monkeypatch.setattr(classifier, "fit_classifier", lambda *a, **how: seen.append(a[2]) or real(*a, **how))
    first, second = new_model(task), new_model(task)
    assert same(first.state_dict(), second.state_dict())
    (cfg,) = seen
    assert (cfg.steps, cfg.lr) == (2, SKS.classifier.lr)
    best, meta = run.load_tensors(run.root / "classifier" / "model.safetensors", None)
    assert same(best, first.classifier.state_dict())
    assert meta["num_images"] == sum(
        pool.image_label(i) is not None for pool in (task.labeled, task.unlabeled) for i in pool.ids
    )
    assert not (run.root / "classifier" / "fit_state.safetensors").exists()


@pytest.mark.parametrize(("last", "best_step"), [(0.98, 4), (0.9, 2)])
def test_the_classifiers_last_weights_are_used_unless_its_auc_fell_clearly(task_of, monkeypatch, last, best_step):
    cfg = replace(SKS, classifier=ClassifierConfig(steps=4, batch_size=4), fit=replace(SKS.fit, val_every=2))
    task, run = task_of(cfg)
    aucs = iter((0.99, last))
    monkeypatch.setattr(classifier, "image_auc", lambda *_, **__: next(aucs))
    new_model(task)
    assert run.read_json(run.root / "classifier" / "metrics.json")["best_step"] == best_step


def test_the_fine_encoder_may_begin_from_the_classifiers(task_of):
    pretrained, own = (
        new_model(task_of(replace(SKS, model=replace(SKS.model, fine_init=init)), init)[0])
        for init in ("classifier", "weights")
    )
    assert same(pretrained.net.fine.state_dict(), pretrained.net.coarse.pyramid.state_dict())
    assert not same(own.net.fine.state_dict(), own.net.coarse.pyramid.state_dict())
    assert same(pretrained.net.coarse.state_dict(), own.net.coarse.state_dict())


def test_a_model_without_classifier_leaves_no_files(task_of):
    task, run = task_of(CFG)
    before = torch.random.get_rng_state()
    assert same(new_model(task).state_dict(), new_model(task).state_dict())
    assert torch.equal(before, torch.random.get_rng_state())
    assert not (run.root / "classifier").exists()
