"""Evaluation: metrics of predictions, of checkpoints and of a round on validation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG

from kmine.config import InferConfig
from kmine.errors import WithheldMaskError
from kmine.ops.metrics import summarise
from kmine.training import evaluation
from kmine.training.checkpoints import Checkpoints
from kmine.training.distributed import SingleDevice
from kmine.training.evaluation import evaluate_checkpoint, evaluate_round, validation_scores
from kmine.training.model_setup import new_model
from kmine.types import CaseMetrics, RoundResult


def test_hd95_is_in_pixels_unless_the_spacing_of_every_image_is_known(task_of, monkeypatch):
    task, _run = task_of(replace(CFG, rounds=0))
    model = new_model(task)
    monkeypatch.setattr(type(task.val), "spacing", lambda self, i: (2.0, 2.0))
    hd95 = {}
    for in_mm in (True, False):
        monkeypatch.setattr(type(task.val), "in_mm", in_mm)
        hd95[in_mm] = evaluate_checkpoint(
            task.val, model, model.state_dict(), batch_size=8, fabric=SingleDevice(torch.device("cpu"))
        ).hd95
    assert hd95[True] == pytest.approx(2 * hd95[False]) and hd95[False] > 0


def test_validation_scores_each_image_at_training_size(task_of, monkeypatch):
    """A model that predicts the true mask of the first image for all of them."""
    task, _run = task_of(replace(CFG, rounds=0, infer=InferConfig(batch_size=3)))
    truth = [task.val.mask_resized(i) for i in task.val.ids]
    probs = np.stack([truth[0] == 0, truth[0] == 1]).astype(np.float32)
    monkeypatch.setattr(evaluation, "predict_resized", lambda model, x, *_: (np.stack([probs] * len(x)), None))
    expected = [2 * (truth[0] & mask).sum() / (truth[0].sum() + mask.sum()) for mask in truth]
    assert validation_scores(task, None) == pytest.approx(expected) and expected[0] == 1


@pytest.mark.parametrize(("alarm", "score"), [(False, 1.0), (True, 0.0)])
def test_silence_on_clean_validation_images_is_chosen_over_false_alarms(task_of, monkeypatch, alarm, score):
    task, _run = task_of(replace(CFG, rounds=0, infer=InferConfig(batch_size=3)))
    size = task.val.mask_resized(task.val.ids[0]).shape
    monkeypatch.setattr(type(task.val), "mask_resized", lambda self, i: np.zeros(size, np.uint8))
    probs = np.stack([np.full(size, not alarm), np.full(size, alarm)]).astype(np.float32)
    monkeypatch.setattr(evaluation, "predict_resized", lambda model, x, *_: (np.stack([probs] * len(x)), None))
    assert set(validation_scores(task, None)) == {score}


def test_a_round_is_refused_for_false_alarms_on_clean_images():
    """30 images, half of them clean. Dice of the lesions rises by .1; 10 clean images get a false alarm: 1.5 - 10."""

    def metrics(dice: float, num_alarms: int):
        lesions = [CaseMetrics(f"l{n}", dice, dice, 1.0, 0) for n in range(15)]
        return summarise(
            lesions + [CaseMetrics(f"c{n}", 0.0 if n < num_alarms else math.nan, 0, 1, 0) for n in range(15)]
        )

    first = RoundResult(0, 4, 0, metrics(0.5, 0), metrics(0.5, 0), True, {})
    second = evaluation._compare_to(first, replace(first, round_idx=1, metrics=metrics(0.6, 10)), str, 0.01)
    assert second.difference == pytest.approx(-8.5 / 30) and not second.adopted
    third = evaluation._compare_to(
        replace(first, metrics=metrics(0.5, 5)), replace(first, metrics=metrics(0.5, 0)), str, 0.01
    )
    assert third.difference == pytest.approx(5 / 30) and third.adopted
    silent = evaluation._compare_to(first, replace(first, metrics=metrics(0.6, 0)), str, 0.01)
    assert silent.difference == pytest.approx(0.05), "all 30 images count"


def result_of(scores, round_idx: int = 1, **fields) -> RoundResult:
    metrics = summarise(CaseMetrics(f"i{n}", float(score), 0.0, 1.0, 0) for n, score in enumerate(scores))
    return RoundResult(round_idx, 4, 3, metrics, metrics, True, {}, **fields)


def test_a_round_is_adopted_if_the_lower_end_of_the_interval_is_within_the_tolerance():
    """Gaps +-.1 around a mean of .01 in 20 images: standard error .1 / sqrt(19), t(.9; 19) 1.328, lower end -.0205."""
    before = result_of([0.5] * 20, 0)
    after = result_of([0.5 + 0.01 + (0.1 if n % 2 else -0.1) for n in range(20)])
    strict, lenient = (evaluation._compare_to(before, after, str, tolerance) for tolerance in (0.02, 0.021))
    assert strict.difference_low == pytest.approx(0.01 - 1.3277 * 0.1 / 19**0.5, abs=1e-4)
    assert (strict.adopted, strict.reason) == (False, "refused: may have fallen by 0.020")
    assert (lenient.adopted, lenient.reason) == (True, "adopted")
    for mean, adopted in ((0.01, True), (0.0, True), (-0.001, False)):
        few = evaluation._compare_to(result_of([0.5] * 19, 0), result_of([0.5 + mean] * 19), str, 0.5)
        assert few.adopted == adopted, "under 20 images the mean counts, whatever the tolerance"
    grouped = evaluation._compare_to(before, after, lambda i: i[:2], 0.0)
    assert grouped.adopted, "ten groups: the mean counts, which rose"


@pytest.mark.parametrize(
    ("score", "reason"), [(0.6, "adopted"), (0.5, "adopted"), (0.4, "refused: 0.100 below round 2")]
)
def test_a_retrained_model_is_adopted_unless_its_mean_is_lower(score, reason):
    best = result_of([0.3, 0.7] * 20, 2)
    found = evaluation._compare_to(best, result_of([score] * 40, 3, retrained=True), str, 0.0)
    assert found.reason == reason and found.adopted == (reason == "adopted")


def test_a_round_is_evaluated_once_and_refused_after_a_fall(task_of, monkeypatch):
    task, _run = task_of(replace(CFG, rounds=0))
    model = new_model(task)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoints = Checkpoints("a", weights, weights, 1.5)
    first = evaluate_round(task, model, checkpoints, round_idx=0)
    assert first.adopted and first.reason == "adopted" and math.isnan(first.difference)
    assert first.num_labeled == len(task.labeled) and first.seconds["fit"] == 1.5

    better = replace(first.metrics, cases=tuple(replace(case, dice=0.99) for case in first.metrics.cases), dice=0.99)
    reference = replace(first, metrics=better)
    how = {"round_idx": 1, "num_pseudo": 7, "reference": reference, "seconds": {"segment": 2.0}}
    second = evaluate_round(task, model, checkpoints, **how)
    fall = 0.99 - first.metrics.dice
    assert not second.adopted and second.reason == f"refused: fell by {fall:.3f}"
    assert second.difference == pytest.approx(-fall) and second.num_pseudo == 7 and second.seconds["segment"] == 2.0

    monkeypatch.setattr(evaluation, "evaluate_checkpoint", None)
    assert evaluate_round(task, model, checkpoints, **how) == second, "read back from metrics.json"
    with pytest.raises(TypeError):
        evaluate_round(task, model, replace(checkpoints, signature="b"), **how)


def test_images_without_their_masks_cannot_be_evaluated(task_of):
    task, _ = task_of(CFG)
    model = new_model(task)
    with pytest.raises(WithheldMaskError):
        evaluate_checkpoint(task.unlabeled, model, model.state_dict(), batch_size=4, fabric=task.fabric)
