"""Laws of the mining loop, on a tiny phantom with a faked segmenter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG, decision, record_steps, same, weights

from kmine.config import PromptsConfig
from kmine.methods import mining
from kmine.methods.mining import mine
from kmine.methods.supervised import supervised
from kmine.mining import candidates
from kmine.mining import round as mining_round
from kmine.mining.pseudo_labels import PseudoLabels
from kmine.ops.metrics import summarise
from kmine.segmenters.ellipse import Ellipse
from kmine.training import evaluation as scoring
from kmine.training import trainer as training
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.training.rounds import kept_round
from kmine.training.train_steps import FitResult
from kmine.training.trainer import train
from kmine.types import Candidate, CaseMetrics, RoundResult, stopped_by


class MaskInputReturned(Ellipse):
    """Returns the mask input of each prompt, which is the local model's own mask."""

    name, signature = "mask input", "mask input"

    def decode(self, embeddings, prompts):
        return [[self._candidate(prompt) for prompt in image] for image in prompts]

    def _candidate(self, prompt):
        mask = prompt.mask_input[None] > 0
        jittered = np.repeat(mask, len(prompt.jittered_boxes), axis=0)
        return Candidate(mask, np.ones(1, np.float32), np.ones(1, np.float32), None, jittered)


def with_dice(*dice):
    """`evaluate_checkpoint` whose n-th call sets the Dice of every image to the n-th value."""
    real, values = scoring.evaluate_checkpoint, iter(dice)

    def evaluate(*args, **settings):
        metrics, value = real(*args, **settings), next(values)
        return replace(metrics, dice=value, cases=tuple(replace(case, dice=value) for case in metrics.cases))

    return evaluate


def test_zero_rounds_is_supervised_training(task_of):
    task, store = task_of(replace(CFG, rounds=0))
    (only,) = mine(task)
    other, other_store = task_of(replace(CFG, rounds=0), "other")
    (baseline,) = supervised(other)
    assert only.metrics == baseline.metrics and only.num_pseudo == 0
    assert same(weights(store, 0), weights(other_store, 0))


def test_mining_and_its_baseline_share_round_0_and_differ_by_pseudo_masks(task_of):
    task, store = task_of(CFG, segmenter=MaskInputReturned())
    mined, baseline = list(mine(task)), list(supervised(task))
    assert [r.round_idx for r in mined] == [r.round_idx for r in baseline] == [0, 1, 2]
    assert mined[0].metrics == baseline[0].metrics
    assert mined[1].num_pseudo > 0 and baseline[1].num_pseudo == 0
    assert not same(weights(store, 1), weights(store, 1, "supervised"))


def test_returned_mask_inputs_are_the_local_models_own_masks(task_of):
    task, store = task_of(replace(CFG, rounds=1), segmenter=MaskInputReturned())
    list(mine(task))
    rows = [r for r in store.decisions(1) if r.is_object]
    assert rows and all(r.evidence.agreement_iou == 1 and r.evidence.jitter_dice == 1 and r.kept for r in rows)
    for sample_id in {r.sample_id for r in rows}:
        assert set(np.unique(store.pseudo_mask(1, sample_id))) <= {0, 1}


def test_given_labels_never_change(task_of):
    task, store = task_of(CFG)
    before = {i: task.labeled.mask_resized(i).copy() for i in task.labeled.ids}
    list(mine(task))
    assert all(np.array_equal(task.labeled.mask_resized(i), before[i]) for i in before)
    assert not {r.sample_id for r in store.decisions(1)} & set(before), "a labeled image is never mined"


def test_a_gate_that_keeps_nothing_ends_the_loop_with_a_message(task_of):
    task, store = task_of(replace(CFG, prompts=PromptsConfig(min_area_px=10_000)))
    first, last = mine(task)
    assert (last.round_idx, last.num_pseudo, last.adopted) == (1, 0, False)
    assert last.metrics == first.metrics, "nothing was trained"
    assert "no pseudo mask was kept" in task.progress.said[-1] and "found no object" in task.progress.said[-1]
    assert store.read_json(store.round_dir(1) / "changes.json")["num_teaching"] == 0
    assert store.decisions(1) and not any(r.kept for r in store.decisions(1))


def test_a_worse_round_is_not_adopted_and_the_next_starts_before_it(task_of, monkeypatch):
    task, store = task_of(replace(CFG, adopt_tolerance=0.15), segmenter=MaskInputReturned())
    monkeypatch.setattr(Checkpoints, "is_last_used", False)
    monkeypatch.setattr(scoring, "evaluate_checkpoint", with_dice(0.5, 0.5, 0.3, 0.3, 0.5, 0.5))
    started_from = []
    real_load = training.LocalModel.load_state_dict
    monkeypatch.setattr(
        training.LocalModel, "load_state_dict", lambda self, w, *a: (started_from.append(w), real_load(self, w, *a))[1]
    )
    results = list(mine(task))
    assert [r.adopted for r in results] == [True, False, True]
    assert [r.reason for r in results] == ["adopted", "refused: fell by 0.200", "adopted"]
    assert [r.difference for r in results[1:]] == [pytest.approx(-0.2), pytest.approx(0.0)], "to the last adopted one"
    assert np.isnan(results[0].difference)
    again = list(mine(task))  # read back from metrics.json
    for name in ("adopted", "reason", "difference", "difference_low", "difference_high"):
        assert [getattr(r, name) for r in results[1:]] == [getattr(r, name) for r in again[1:]]
    saved = store.read_json(store.round_dir(1) / "metrics.json")
    assert (saved["reason"], saved["difference_high"]) == ("refused: fell by 0.200", pytest.approx(-0.2))
    best_of_0, best_of_1 = weights(store, 0, name="model"), weights(store, 1, name="model")
    # Loads: two to evaluate round 0, one to mine and one to fit round 1, two to evaluate it, then those of round 2.
    assert same(started_from[6], best_of_0) and same(started_from[7], best_of_0)
    assert not same(started_from[6], best_of_1)


def test_a_retrained_model_has_the_initial_weights_the_last_masks_and_the_steps_of_all_rounds(task_of, monkeypatch):
    steps = record_steps(monkeypatch)
    cfg = replace(CFG, retrain=True, fit=replace(CFG.fit, round_lr=5e-4))
    task, store = task_of(cfg, segmenter=MaskInputReturned())
    results = list(mine(task))
    assert [r.round_idx for r in results] == [0, 1, 2, 3] and steps == [12, 6, 6, 24]
    assert [r.retrained for r in results] == [False, False, False, True]
    assert results[3].num_pseudo == results[2].num_pseudo > 0 and not store.decisions(3)
    signature, rows = store.round_signature(2), store.decisions(2)
    pool = PseudoLabels(task, 2, signature, rows, {}).pool
    by_hand = replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, round_steps=24, round_lr=cfg.fit.lr)))
    inputs = {"pseudo": pool, "pseudo_signature": signature}
    train(by_hand, new_model(task), round_idx=3, method_dir="by_hand", **inputs)
    assert same(weights(store, 3), weights(store, 3, "by_hand"))
    steps.clear()
    again = list(mine(task))
    assert steps == [] and again[3] == results[3] and stopped_by(results, 2) == "rounds"


def test_without_pseudo_masks_nothing_is_retrained_and_else_on_those_of_the_last_round_with_any(task_of, monkeypatch):
    task, _store = task_of(replace(CFG, retrain=True, prompts=PromptsConfig(min_area_px=10_000)))
    assert [r.retrained for r in mine(task)] == [False, False]
    task, store = task_of(replace(CFG, retrain=True), "second", segmenter=MaskInputReturned())
    shorter = list(mine(replace(task, cfg=replace(task.cfg, rounds=1))))
    assert shorter[2].retrained and weights(store, 2), "in the folder of the next round, if there is one"
    nothing, real = type("Nothing", (dict,), {"seconds": {}})(), mining.pseudo_label
    monkeypatch.setattr(mining, "pseudo_label", lambda *inputs: real(*inputs) if inputs[4] == 1 else nothing)
    steps = record_steps(monkeypatch)
    results = list(mine(task))
    assert [r.num_pseudo for r in results[2:]] == [0, results[1].num_pseudo] and steps == [18]
    assert results[3].retrained and stopped_by(results, 2) == "no_pseudo_masks"
    assert [path.parent.name for path in sorted(store.root.glob("round_*/metrics.json"))] == [
        "round_00", "round_01", "round_03"
    ]  # fmt: skip
    assert not list(store.round_dir(2).glob("*.safetensors"))


def test_the_kept_round_is_the_best_of_the_adopted_and_of_equals_the_last():
    metrics = [summarise([CaseMetrics("a", dice, dice, 1.0, 0)]) for dice in (0.5, 0.7, 0.7, 0.9, 0.6)]
    rounds = [RoundResult(n, 4, 3, one, one, n != 3, {}) for n, one in enumerate(metrics)]
    assert kept_round(rounds).round_idx == 2, "round 3 was refused"
    assert kept_round([*rounds, replace(rounds[3], round_idx=5, adopted=True)]).round_idx == 5
    assert kept_round(rounds[:1]).round_idx == 0


def test_two_refused_rounds_in_a_row_end_the_loop_and_a_single_one_does_not(task_of, monkeypatch):
    task, store = task_of(replace(CFG, rounds=6, adopt_tolerance=0.05), segmenter=MaskInputReturned())
    by_round = (0.5, 0.3, 0.5, 0.3, 0.3, 0.9)
    monkeypatch.setattr(Checkpoints, "is_last_used", False)
    monkeypatch.setattr(scoring, "evaluate_checkpoint", with_dice(*(dice for dice in by_round for _ in range(2))))
    results = list(mine(task))
    assert [r.adopted for r in results] == [True, False, True, False, False]
    assert not store.round_dir(5).exists()


def test_self_training_and_an_unchanged_training_set_are_reported(task_of, monkeypatch):
    task, store = task_of(replace(CFG, adopt_tolerance=0.05), segmenter=MaskInputReturned())
    monkeypatch.setattr(scoring, "evaluate_checkpoint", with_dice(0.5, 0.5, 0.3, 0.3, 0.5, 0.5))
    rounds = list(mine(task))
    first, second = (store.read_json(store.round_dir(n) / "changes.json") for n in (1, 2))
    assert first["changed_pixels"] == first["taught_pixels"] == first["num_differing"] == 0
    assert first["noop"] and first["segmenter_changed_nothing"] and not first["training_set_unchanged"]
    assert first["num_new"] == rounds[1].num_pseudo == second["num_kept_on"] > 0
    assert second["training_set_unchanged"], "round 1 was refused, and these masks do not depend on jittered boxes"
    lines = [text for text in task.progress.said if text.startswith("round ")]
    assert lines[0].startswith(f"round 1: {first['num_new']} of {len(task.unlabeled)} unlabeled images have a pseudo")
    warning = "the segmenter changed nothing: this round is self-training; take another --segmenter.name"
    assert lines[1] == f"round 1: warning: {warning}"
    assert lines[4].startswith("round 2: warning: mining changed nothing: images and pseudo masks are those of")
    monkeypatch.setattr(mining_round, "compare_rounds", None)
    task.progress.said.clear()
    list(mine(task))
    assert [text for text in task.progress.said if text.startswith("round ")] == lines, "read back and logged again"


def test_changes_are_counted_against_the_masks_of_the_round_before(task_of):
    task, store = task_of(CFG, segmenter=Ellipse())
    list(mine(task))
    trained = [{r.sample_id for r in store.decisions(n) if r.in_training} for n in (1, 2)]
    changes = [store.read_json(store.round_dir(n) / "changes.json") for n in (1, 2)]
    assert set(changes[0]["new"]) == trained[0] and not changes[0]["kept_on"]
    assert set(changes[1]["kept_on"]) == trained[0] & trained[1]
    assert set(changes[1]["new"]) == trained[1] - trained[0] and set(changes[1]["expelled"]) == trained[0] - trained[1]
    both = trained[0] & trained[1]
    assert changes[1]["num_remasked"] == sum(
        not np.array_equal(store.pseudo_mask(1, i), store.pseudo_mask(2, i)) for i in both
    )
    pixels = np.concatenate([store.pseudo_mask(1, i).ravel() for i in sorted(trained[0])])
    assert changes[0]["ignored_pixels"] == pytest.approx((pixels == 255).mean())
    assert changes[0]["changed_pixels"] > 0.01 and not changes[0]["segmenter_changed_nothing"]


@pytest.fixture
def fitted(task_of, monkeypatch):
    """Inputs of a training on labels, and of one on labels and two pseudo masks, by fit settings.

    Returns two triples: signature, settings, batches; nothing is trained.
    """
    task, _store = task_of(CFG)
    model, trainings = new_model(task), []

    def fit(model, batches, cfg, **_):
        trainings.append((cfg, batches))
        return FitResult(dict(model.state_dict()), 1, dict(model.state_dict()), [])

    monkeypatch.setattr(training, "fit", fit)

    def both(**settings):
        varied = replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, **settings)))
        pool = PseudoLabels(varied, 1, "x", [decision(i, 0.25) for i in task.unlabeled.ids[:2]], {}).pool
        method_dir = f"settings{len(trainings)}"
        labels = train(varied, model, round_idx=1, method_dir=method_dir)
        mined = train(varied, model, round_idx=1, pseudo=pool, pseudo_signature="x", method_dir=method_dir)
        return [(fitted.signature, *made) for fitted, made in zip((labels, mined), trainings[-2:], strict=True)]

    return both


EFFECTS = {
    "strong_augment": (
        True,
        False,
        lambda cfg, batches: batches.plan.strong.strong and not batches.plan.augment.strong,
    ),
    "feature_perturbation": (0.5, False, lambda cfg, batches: cfg.feature_perturbation == 0.5),
    "pseudo_weight": ("estimated", False, lambda cfg, batches: set(batches.pseudo.weights.values()) == {0.25}),
    "max_empty_share": (0.5, False, lambda cfg, batches: cfg.max_empty_share == 0.5),
    "cutmix": (1.0, True, lambda cfg, batches: batches.plan.cutmix == 1.0),
    "ema_decay": (0.5, True, lambda cfg, batches: cfg.ema_decay == 0.5),
}
"""Setting: value, whether it also affects a training without pseudo masks, and a check that it took effect."""


def test_a_setting_signs_and_reaches_only_the_trainings_that_it_affects(fitted):
    plain = fitted()
    for name, (value, labels_too, effective) in EFFECTS.items():
        labels, mined = fitted(**{name: value})
        assert (labels[0] != plain[0][0]) == labels_too, name
        assert mined[0] != plain[1][0], name
        assert effective(*mined[1:]) and not effective(*plain[1][1:]), name
        assert not labels_too or effective(*labels[1:]), name


def test_a_cascade_blends_the_masks_of_the_round_before_from_round_2_on(task_of, monkeypatch):
    seen: dict[str, int] = {}
    real = candidates.blend_previous_mask

    def blend(prompts, previous):
        for class_id, mask in previous:
            assert class_id == 1 and mask().dtype == bool
        seen["objects"] = seen.get("objects", 0) + len(previous)
        return real(prompts, previous)

    monkeypatch.setattr(candidates, "blend_previous_mask", blend)
    task, store = task_of(replace(CFG, prompts=replace(CFG.prompts, source="cascade")), segmenter=Ellipse())
    rounds = iter(mine(task))
    next(rounds), next(rounds)
    assert seen["objects"] == 0
    next(rounds)
    assert seen["objects"] == sum(row.is_object for row in store.decisions(1)) > 0


def test_the_prompts_of_a_second_pass_are_the_recorded_ones(task_of):
    once, once_store = task_of(replace(CFG, rounds=1), segmenter=Ellipse())
    twice, twice_store = task_of(
        replace(CFG, rounds=1, prompts=replace(CFG.prompts, passes=2)), "twice", segmenter=Ellipse()
    )
    list(mine(once)), list(mine(twice))
    first, second = ([row.box for row in store.prompts(1)] for store in (once_store, twice_store))
    assert len(first) == len(second) > 0 and first != second
