"""Laws of the loop, on a tiny phantom with a faked segmenter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import (
    ANYTHING_GOES,
    CFG,
    same,
    weights,
)

from kmine.methods.mining import mine
from kmine.methods.supervised import supervised
from kmine.mining import candidates as asking
from kmine.mining import pseudo_labels as teaching
from kmine.mining.pseudo_labels import pseudo_labeled_pool
from kmine.segmenters.ellipse import Ellipse
from kmine.training import evaluation as scoring
from kmine.training import trainer as training
from kmine.training.model_setup import new_model
from kmine.training.train_steps import FitResult
from kmine.training.trainer import train
from kmine.types import Candidate


class Echo(Ellipse):
    """Gives the mask hint back: the local model's own opinion."""

    name, signature = "echo", "echo"

    def decode(self, embeddings, prompts):
        return [[self._answer(asked) for asked in all_asked] for all_asked in prompts]

    def _answer(self, asked):
        mask = asked.mask_input[None] > 0
        jittered = np.repeat(mask, len(asked.jittered_boxes), axis=0)
        return Candidate(mask, np.ones(1, np.float32), np.ones(1, np.float32), None, jittered)


def claiming(*dice):
    """`evaluate_checkpoint`, but every image of its first call has the first Dice, of its second the second, and so on."""
    real, claims = scoring.evaluate_checkpoint, iter(dice)

    def evaluate_on(*args, **more):
        found, claim = real(*args, **more), next(claims)
        return replace(found, dice=claim, cases=tuple(replace(case, dice=claim) for case in found.cases))

    return evaluate_on


def test_zero_rounds_is_supervised_training(task_of):
    task, store = task_of(replace(CFG, rounds=0))
    (only,) = mine(task)
    other, other_store = task_of(replace(CFG, rounds=0), "other")
    (baseline,) = supervised(other)
    assert only.metrics == baseline.metrics and only.num_pseudo == 0
    assert same(weights(store, 0), weights(other_store, 0))


def test_mining_and_its_baseline_share_round_0_and_differ_by_the_pseudo_masks_alone(task_of):
    task, store = task_of(CFG, segmenter=Echo())
    mined, baseline = list(mine(task)), list(supervised(task))
    assert [r.round_idx for r in mined] == [r.round_idx for r in baseline] == [0, 1, 2]
    assert mined[0].metrics == baseline[0].metrics
    assert mined[1].num_pseudo > 0 and baseline[1].num_pseudo == 0
    assert not same(weights(store, 1), weights(store, 1, "supervised"))


def test_an_echo_gives_the_local_model_s_own_masks(task_of):
    task, store = task_of(replace(CFG, rounds=1), segmenter=Echo())
    list(mine(task))
    rows = [r for r in store.decisions(1) if r["object_idx"] >= 0]
    assert rows and all(r["agreement_iou"] == 1 and r["jitter_dice"] == 1 and r["kept"] for r in rows)
    for sample_id in {r["sample_id"] for r in rows}:
        assert set(np.unique(store.pseudo_mask(1, sample_id))) <= {0, 1}


def test_given_labels_never_change(task_of):
    task, store = task_of(CFG)
    before = {i: task.labeled.mask_resized(i).copy() for i in task.labeled.ids}
    list(mine(task))
    assert all(np.array_equal(task.labeled.mask_resized(i), before[i]) for i in before)
    assert not {r["sample_id"] for r in store.decisions(1)} & set(before), "a labeled image is never mined"


def test_a_gate_that_keeps_nothing_ends_the_loop_and_says_so(task_of):
    task, store = task_of(replace(CFG, gate=replace(ANYTHING_GOES, min_confidence=1.0)))
    first, last = mine(task)
    assert (last.round_idx, last.num_pseudo, last.adopted) == (1, 0, False)
    assert last.metrics == first.metrics, "nothing was trained"
    assert "no pseudo mask was kept" in task.progress.said[-1] and "low_confidence" in task.progress.said[-1]
    assert store.read_json(store.round_dir(1) / "changes.json")["num_teaching"] == 0
    assert store.decisions(1) and not any(r["kept"] for r in store.decisions(1))


def test_a_round_that_hurts_is_not_adopted_and_the_next_starts_before_it(task_of, monkeypatch):
    task, store = task_of(replace(CFG, adopt_tolerance=0.15), segmenter=Echo())
    monkeypatch.setattr(scoring, "evaluate_checkpoint", claiming(0.5, 0.5, 0.3, 0.3, 0.4, 0.4))
    started_from = []
    real_load = training.LocalModel.load_state_dict
    monkeypatch.setattr(
        training.LocalModel, "load_state_dict", lambda self, w, *a: (started_from.append(w), real_load(self, w, *a))[1]
    )
    results = list(mine(task))
    assert [r.adopted for r in results] == [True, False, True]
    assert [r.reason for r in results] == ["adopted", "refused: fell by 0.200", "adopted"]
    assert [r.difference for r in results[1:]] == [pytest.approx(-0.2), pytest.approx(-0.1)], "to the last adopted one"
    assert np.isnan(results[0].difference)
    again = list(mine(task))  # read back from metrics.json
    for name in ("adopted", "reason", "difference", "difference_low", "difference_high"):
        assert [getattr(r, name) for r in results[1:]] == [getattr(r, name) for r in again[1:]]
    saved = store.read_json(store.round_dir(1) / "metrics.json")
    assert (saved["reason"], saved["difference_high"]) == ("refused: fell by 0.200", pytest.approx(-0.2))
    best_of_0, best_of_1 = weights(store, 0, name="model"), weights(store, 1, name="model")
    # Loads: 2 to score round 0, to mine and to fit round 1, 2 to score it, then to mine and to fit round 2.
    assert same(started_from[6], best_of_0) and same(started_from[7], best_of_0)
    assert not same(started_from[6], best_of_1)


def test_two_refused_rounds_in_a_row_end_the_loop_and_one_between_adopted_ones_does_not(task_of, monkeypatch):
    task, store = task_of(replace(CFG, rounds=6, adopt_tolerance=0.05), segmenter=Echo())
    of_rounds = (0.5, 0.3, 0.5, 0.3, 0.3, 0.9)
    monkeypatch.setattr(scoring, "evaluate_checkpoint", claiming(*(dice for dice in of_rounds for _ in range(2))))
    results = list(mine(task))
    assert [r.adopted for r in results] == [True, False, True, False, False]
    assert not store.round_dir(5).exists()


def test_an_echo_is_told_from_mining_and_a_round_mined_again_from_the_same_model_too(task_of, monkeypatch):

    task, store = task_of(replace(CFG, adopt_tolerance=0.05), segmenter=Echo())
    monkeypatch.setattr(scoring, "evaluate_checkpoint", claiming(0.5, 0.5, 0.3, 0.3, 0.5, 0.5))
    rounds = list(mine(task))
    first, second = (store.read_json(store.round_dir(n) / "changes.json") for n in (1, 2))
    assert first["changed_pixels"] == first["taught_pixels"] == first["num_differing"] == 0
    assert first["noop"] and first["segmenter_changed_nothing"] and not first["training_set_unchanged"]
    assert first["num_new"] == rounds[1].num_pseudo == second["num_kept_on"] > 0
    assert second["training_set_unchanged"], "round 1 was refused, and an echo is not shaken by the boxes"
    said = [text for text in task.progress.said if text.startswith("round ")]
    assert said[0].startswith(f"round 1: {first['num_new']} of {len(task.unlabeled)} unlabeled images teach")
    assert said[1] == "round 1: warning: the segmenter changed nothing: this round is self-training"
    assert said[4].startswith("round 2: warning: mining changed nothing: the same images with the same masks")
    monkeypatch.setattr(teaching, "compare_rounds", None)
    task.progress.said.clear()
    list(mine(task))
    assert [text for text in task.progress.said if text.startswith("round ")] == said, "read back, and said again"


def test_what_changed_is_told_from_the_masks_of_the_round_before(task_of):
    task, store = task_of(CFG, segmenter=Ellipse())
    list(mine(task))
    teaching = [{r["sample_id"] for r in store.decisions(n) if r["in_training"]} for n in (1, 2)]
    told = [store.read_json(store.round_dir(n) / "changes.json") for n in (1, 2)]
    assert set(told[0]["new"]) == teaching[0] and not told[0]["kept_on"]
    assert set(told[1]["kept_on"]) == teaching[0] & teaching[1]
    assert set(told[1]["new"]) == teaching[1] - teaching[0] and set(told[1]["expelled"]) == teaching[0] - teaching[1]
    both = teaching[0] & teaching[1]
    assert told[1]["num_remasked"] == sum(
        not np.array_equal(store.pseudo_mask(1, i), store.pseudo_mask(2, i)) for i in both
    )
    pixels = np.concatenate([store.pseudo_mask(1, i).ravel() for i in sorted(teaching[0])])
    assert told[0]["ignored_pixels"] == pytest.approx((pixels == 255).mean())
    assert told[0]["changed_pixels"] > 0.01 and not told[0]["segmenter_changed_nothing"]


@pytest.fixture
def fitted(task_of, monkeypatch):
    """What a training on labels, and one on labels and two pseudo masks, would be made of with given settings.

    Two triples: signature, settings, batches; nothing is trained.
    """
    task, _store = task_of(CFG)
    model, asked = new_model(task), []

    def fit(model, batches, cfg, **_):
        asked.append((cfg, batches))
        return FitResult(dict(model.state_dict()), 1, dict(model.state_dict()), [])

    monkeypatch.setattr(training, "fit", fit)

    def both(**settings):
        varied = replace(task, cfg=replace(task.cfg, fit=replace(task.cfg.fit, **settings)))
        pool = pseudo_labeled_pool(varied, 1, [decision(i, 0.25) for i in task.unlabeled.ids[:2]])
        how = {"start": None, "method_dir": f"arm{len(asked)}"}
        alone = train(varied, model, round_idx=1, **how)
        mined = train(varied, model, round_idx=1, pseudo=pool, pseudo_signature="x", **how)
        return [(found.signature, *made) for found, made in zip((alone, mined), asked[-2:], strict=True)]

    return both


def decision(sample_id, estimated, reason="kept", object_idx=0):
    kept = reason in ("kept", "lesion_free")
    row = {"sample_id": sample_id, "object_idx": object_idx, "kept": kept, "reason": reason, "in_training": True}
    return {**row, "estimated_dice": estimated}


CONCERNS = {
    "strong_augment": (True, False, lambda cfg, batches: batches.pseudo_augment.strong and not batches.augment.strong),
    "feature_perturbation": (0.5, False, lambda cfg, batches: cfg.feature_perturbation == 0.5),
    "pseudo_weight": ("estimated", False, lambda cfg, batches: set(batches.pseudo.weights.values()) == {0.25}),
    "max_empty_share": (0.5, False, lambda cfg, batches: cfg.max_empty_share == 0.5),
    "cutmix": (1.0, True, lambda cfg, batches: batches.cutmix == 1.0),
    "ema_decay": (0.5, True, lambda cfg, batches: cfg.ema_decay == 0.5),
}
"""Setting: value, whether it concerns a training without pseudo masks too, and how the training shows it."""


def test_a_setting_signs_and_reaches_the_trainings_it_concerns_and_no_other(fitted):
    plain = fitted()
    for name, (value, labels_too, shown) in CONCERNS.items():
        alone, mined = fitted(**{name: value})
        assert (alone[0] != plain[0][0]) == labels_too, name
        assert mined[0] != plain[1][0], name
        assert shown(*mined[1:]) and not shown(*plain[1][1:]), name
        assert not labels_too or shown(*alone[1:]), name


def test_from_round_2_on_a_cascade_remembers_the_round_before(task_of, monkeypatch):

    seen: dict[str, int] = {}
    real = asking.blend_previous_mask

    def remember(asked, before):
        for class_id, mask in before:
            assert class_id == 1 and mask().dtype == bool
        seen["objects"] = seen.get("objects", 0) + len(before)
        return real(asked, before)

    monkeypatch.setattr(asking, "blend_previous_mask", remember)
    task, store = task_of(replace(CFG, prompts=replace(CFG.prompts, source="cascade")), segmenter=Ellipse())
    rounds = iter(mine(task))
    next(rounds), next(rounds)
    assert seen["objects"] == 0
    next(rounds)
    assert seen["objects"] == sum(row["object_idx"] >= 0 for row in store.decisions(1)) > 0


def test_a_second_pass_is_recorded_as_what_was_asked(task_of):
    once, once_store = task_of(replace(CFG, rounds=1), segmenter=Ellipse())
    twice, twice_store = task_of(
        replace(CFG, rounds=1, prompts=replace(CFG.prompts, passes=2)), "twice", segmenter=Ellipse()
    )
    list(mine(once)), list(mine(twice))
    first, second = ([row["box"] for row in store.prompts(1)] for store in (once_store, twice_store))
    assert len(first) == len(second) > 0 and first != second
