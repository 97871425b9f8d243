"""The veto of sks: calibrated on validation images, harmless where these do not support it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG
from sklearn.linear_model import LogisticRegression

from kmine.config import ClassifierConfig, ModelConfig
from kmine.training import veto
from kmine.training.model_setup import new_model
from kmine.training.trainer import train
from kmine.training.veto import (
    BUFFER,
    MIN_IMAGES,
    Veto,
    choose_veto,
    clear_veto,
    infer_by_labels,
    is_vetoed,
    platt,
    without_veto,
)

SKS = replace(
    CFG,
    data=replace(CFG.data, kind="ct", num_samples=60, size=32, val_fraction=0.4),
    model=ModelConfig(name="sks", encoder="mobilenetv3_small_050", decoder_channels=8, veto=True),
    classifier=ClassifierConfig(steps=2, batch_size=4),
    fit=replace(CFG.fit, steps=2, val_every=2),
)


def case(num_lesion: int, num_clean: int, alarms: int, separation: float, seed: int = 0):
    """Logits, truth, scores without and with veto: all lesions are found with Dice .8, `alarms` clean images, too."""
    rng = np.random.default_rng(seed)
    truth = np.arange(num_lesion + num_clean) < num_lesion
    logits = rng.normal(0, 1, len(truth)) + separation * truth
    kept = np.where(truth, 0.8, 1.0)
    kept[num_lesion : num_lesion + alarms] = 0.0
    return logits, truth, kept, np.where(truth, 0.0, 1.0)


def test_platt_is_logistic_regression_on_smoothed_targets():
    logits, truth, *_ = case(30, 10, 0, 2.0)
    found = platt(logits, truth)
    targets = np.where(truth, 31 / 32, 1 / 12)
    fit = LogisticRegression(C=1e9, tol=1e-10).fit(
        np.tile(logits, 2)[:, None], np.repeat([1, 0], 40), np.concatenate([targets, 1 - targets])
    )
    assert found.slope == pytest.approx(fit.coef_[0, 0], abs=1e-3)
    assert found.offset == pytest.approx(fit.intercept_[0], abs=1e-3)


def test_a_good_classifier_vetoes_false_alarms_and_no_lesion():
    logits, truth, kept, vetoed = case(26, 14, 4, 12.0)
    veto = choose_veto(logits, truth, kept, vetoed)
    assert (veto.num_clean, veto.num_lesions) == (4, 0)
    assert ((veto.probabilities(logits) < veto.threshold) == ~truth).all()


def test_the_threshold_is_where_the_expected_score_changes_sign():
    logits, truth, kept, vetoed = case(26, 14, 4, 12.0)
    ratio = (26 + 1) / (26 + 2) / ((4 + 1) / (14 + 2))
    assert choose_veto(logits, truth, kept, vetoed).threshold == pytest.approx(1 / (1 + 0.8 * ratio))


def test_a_classifier_without_knowledge_vetoes_nothing_but_by_rare_luck():
    chosen = [choose_veto(*case(26, 14, 4, 0.0, seed)) for seed in range(100)]
    assert sum(veto.threshold > 0 for veto in chosen) <= 3


def test_vetoes_do_not_lower_the_score_of_the_validation_images():
    for seed in range(20):
        logits, truth, kept, vetoed = case(26, 14, 1, 1.5, seed)
        veto = choose_veto(logits, truth, kept, vetoed)
        assert (vetoed - kept)[veto.probabilities(logits) < veto.threshold].sum() >= 0


def test_a_classifier_that_is_wrong_vetoes_nothing():
    logits, *rest = case(26, 14, 4, 4.0)
    assert choose_veto(-logits, *rest).threshold == 0


@pytest.mark.parametrize(("num_lesion", "num_clean"), [(MIN_IMAGES - 1, 20), (20, MIN_IMAGES - 1), (20, 0)])
def test_few_images_of_a_kind_veto_nothing(num_lesion, num_clean):
    assert choose_veto(*case(num_lesion, num_clean, min(2, num_clean), 12.0)) == Veto()


def test_a_lesion_that_is_likelier_than_not_is_kept_however_poor_its_outline():
    logits, truth, _kept, vetoed = case(26, 14, 14, 1.0)
    veto = choose_veto(logits, truth, np.where(truth, 0.05, 0.0), vetoed)
    assert veto.threshold <= 0.5


def test_without_a_found_lesion_nothing_is_vetoed():
    logits, truth, _kept, vetoed = case(20, 20, 0, 12.0)
    assert choose_veto(logits, truth, vetoed, vetoed) == Veto()


def test_both_checkpoints_hold_their_veto_which_the_next_round_starts_without(task_of):
    task, run = task_of(SKS)
    model = new_model(task)
    done = train(task, model, round_idx=0)
    record = run.read_json(run.round_dir(0) / "veto.json")
    for name, weights in (("best", done.best), ("final", done.final)):
        assert torch.equal(weights[BUFFER], Veto(**record[name]).tensor())
    model.load_state_dict(done.best)
    model.net.veto.fill_(0.5)
    clear_veto(model)
    assert torch.equal(model.net.veto, Veto().tensor())


@pytest.fixture
def vetoing(task_of):
    """A task and a model that vetoes every image."""
    task, _ = task_of(SKS)
    model = new_model(task)
    model.net.veto.copy_(torch.tensor([0.0, -10.0, 0.5]))
    return task, model


def test_images_labeled_with_a_lesion_are_never_vetoed(vetoing):
    task, model = vetoing
    samples = [
        replace(task.unlabeled.sample(i), image_label=n % 3 or None) for n, i in enumerate(task.unlabeled.ids[:6])
    ]
    samples[3] = replace(samples[3], image_label=0)
    settings = {"batch_size": 4, "tta": "hflip", "device": torch.device("cpu")}
    saved = model.net.veto.clone()
    found = infer_by_labels(model, task.unlabeled, samples, **settings)
    assert torch.equal(model.net.veto, saved) and [p.sample_id for p in found] == [s.sample_id for s in samples]
    assert [is_vetoed(model, p) for p in found] == [s.image_label != 1 for s in samples]
    with without_veto(model):
        free = infer_by_labels(model, task.unlabeled, samples, **settings)
        assert not any(is_vetoed(model, p) for p in free)
    np.testing.assert_allclose(found[1].probs, free[1].probs, atol=1e-5)


def test_a_model_without_a_veto_predicts_all_images_together(vetoing, monkeypatch):
    task, model = vetoing
    clear_veto(model)
    calls, real = [], veto.infer

    def infer(model, pool, ids, **settings):
        calls.append(len(ids))
        return real(model, pool, ids, **settings)

    monkeypatch.setattr(veto, "infer", infer)
    samples = [replace(task.unlabeled.sample(i), image_label=1) for i in task.unlabeled.ids[:3]]
    found = infer_by_labels(model, task.unlabeled, samples, batch_size=4, tta="none", device=torch.device("cpu"))
    assert calls == [3, 0] and not any(is_vetoed(model, p) for p in found)
