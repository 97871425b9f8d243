"""Training of a round: its schedule, and what its signature covers. The training itself is replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG

from kmine.config import FitConfig
from kmine.feedback.verdict_effects import NO_VERDICTS
from kmine.training import trainer
from kmine.training.fit import Consistency
from kmine.training.model_setup import new_model
from kmine.training.train_steps import FitResult
from kmine.training.trainer import clean_images, train


@pytest.fixture
def fitted(monkeypatch):
    """(settings, batches, further arguments) of every call of `fit`."""
    calls = []

    def fit(model, batches, cfg, **how):
        calls.append((cfg, batches, how))
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        return FitResult(weights, 1, weights, [(1, 0.5, 0.5)])

    monkeypatch.setattr(trainer, "fit", fit)
    return calls


def varied(task, **fit):
    return replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, **fit)))


def test_round_0_and_later_rounds_have_their_own_steps_and_learning_rate(task_of, fitted):
    task, _run = task_of(CFG)
    task = varied(task, round_lr=0.5, labeled_share=0.7, ema_decay=0.9)
    model = new_model(task)
    start = train(task, model, round_idx=0)
    train(task, model, round_idx=1, start=start, pseudo=task.labeled, pseudo_signature="x")
    train(task, model, round_idx=1, start=start, consistency=Consistency("c", lambda *_: None), method_dir="fixmatch")
    first, pseudo, consistency = (cfg for cfg, *_ in fitted)
    assert (first.lr, first.steps) == (task.cfg.fit.lr, 12)
    assert (pseudo.lr, pseudo.steps) == (consistency.lr, consistency.steps) == (0.5, 6)
    assert first.labeled_share == FitConfig.labeled_share, "without effect on labels only, so it is not signed"
    assert pseudo.labeled_share == consistency.labeled_share == 0.7
    assert (first.ema_decay, pseudo.ema_decay, consistency.ema_decay) == (0.9, 0.9, 0.0), "the method's own decay"
    assert [how["consistency_fn"] is None for *_, how in fitted] == [True, True, False]
    seeds = [how["seed"] for *_, how in fitted]
    assert seeds[0] != seeds[1] == seeds[2]


def test_a_finished_training_is_read_back_unless_a_setting_that_matters_has_changed(task_of, fitted):
    task, _run = task_of(CFG)
    model = new_model(task)
    signature = train(task, model, round_idx=0).signature
    no_effect = {"num_workers": 2, "round_steps": 9, "round_lr": 0.1, "max_empty_share": 0.9}
    assert train(varied(task, **no_effect), model, round_idx=0).signature == signature and len(fitted) == 1
    other = varied(task, steps=13), varied(task, lr=0.1), replace(task, signature="other data")
    signatures = {train(changed, model, round_idx=0).signature for changed in other}
    assert len(signatures | {signature}) == 4 and len(fitted) == 4


@pytest.mark.parametrize(("kind", "dice"), [("ct", "batch"), ("polyp", "image")])
def test_false_alarms_count_in_dice_where_a_labeled_image_is_clean(task_of, fitted, kind, dice):
    task, _run = task_of(replace(CFG, data=replace(CFG.data, kind=kind)))
    assert {task.labeled.image_label(i) for i in task.labeled.ids} == ({0, 1} if kind == "ct" else {1})
    train(task, new_model(task), round_idx=0)
    train(varied(task, dice="image"), new_model(task), round_idx=0)
    assert [cfg.dice for cfg, *_ in fitted] == ([dice, "image"] if dice == "batch" else ["image"]), "signed as resolved"


def test_the_models_of_folds_count_false_alarms_as_that_of_all_labels(task_of, fitted):
    """A fold may hold none of the clean images: the gate would be calibrated on models trained otherwise."""
    task, _run = task_of(replace(CFG, data=replace(CFG.data, kind="ct")))
    lesions = task.labeled.subset([i for i in task.labeled.ids if not task.labeled.is_clean(i)])
    fold, model = replace(task, labeled=lesions), new_model(task)
    assert task.dice == "batch"
    whole = train(task, model, round_idx=0).signature
    assert train(replace(task, dice=None), model, round_idx=0).signature == whole, "signed as before"
    train(fold, model, round_idx=0, method_dir="fold_0")
    train(replace(fold, dice=None), model, round_idx=0, method_dir="fold_1")
    assert [cfg.dice for cfg, *_ in fitted] == ["batch", "batch", "image"]


def test_weights_and_signature_of_pseudo_masks_are_signed(task_of, fitted):
    task, _run = task_of(CFG)
    model, pool = new_model(task), task.labeled
    weighted = pool.with_masks(pool.ids, pool.mask_resized, weights=dict.fromkeys(pool.ids, 0.5))
    inputs = [(pool, "x"), (pool, "y"), (weighted, "x"), (None, "")]
    signatures = [train(task, model, round_idx=1, pseudo=p, pseudo_signature=s).signature for p, s in inputs]
    assert len(set(signatures)) == len(fitted) == 4


def test_clean_unlabeled_images_take_part_where_there_are_no_pseudo_masks(task_of, fitted):
    task, _run = task_of(replace(CFG, data=replace(CFG.data, kind="ct"), fit=replace(CFG.fit, clean_share=0.5)))
    model, labels = new_model(task), {i: task.unlabeled.image_label(i) for i in task.unlabeled.ids}
    clean = {i for i, label in labels.items() if label == 0}
    start = train(task, model, round_idx=0)
    train(task, model, round_idx=1, start=start, pseudo=task.labeled, pseudo_signature="x")
    train(task, model, round_idx=1, start=start, consistency=Consistency("c", lambda *_: None), method_dir="fixmatch")
    (cfg, batches, _), *others = fitted
    assert cfg.clean_share == min(0.5, len(clean) / (len(clean) + len(task.labeled)))
    assert {*batches.pseudo.ids} == clean == batches.pseudo.empty and batches.num_pseudo == round(4 * cfg.clean_share)
    assert task.unlabeled._masks == "withheld" and not any(batches.pseudo.mask_resized(i).any() for i in clean)
    batch = batches[0]
    assert batch.pseudo.sum() == batches.num_pseudo and set(batch.weights) == {1}
    assert [cfg.clean_share for cfg, *_ in others] == [0, 0]


def test_a_clean_image_whose_mask_a_reviewer_rejected_is_left_out(task_of):
    task, _run = task_of(replace(CFG, data=replace(CFG.data, kind="ct"), fit=replace(CFG.fit, clean_share=0.5)))
    first, *rest = clean_images(task).ids
    assert clean_images(replace(task, review=replace(NO_VERDICTS, rejected=frozenset({first})))).ids == (*rest,)
    assert clean_images(replace(task, review=replace(NO_VERDICTS, rejected=frozenset({first, *rest})))) is None


@pytest.mark.parametrize("changes", [{"kind": "polyp"}, {"kind": "ct"}])
def test_without_clean_images_or_a_share_for_them_nothing_changes(task_of, fitted, changes):
    share = 0.5 if changes["kind"] == "polyp" else 0.0
    task, _run = task_of(replace(CFG, data=replace(CFG.data, **changes)))
    model = new_model(task)
    signatures = {train(varied(task, clean_share=s), model, round_idx=0).signature for s in (0.0, share)}
    assert len(signatures) == len(fitted) == 1 and fitted[0][1].pseudo is None
