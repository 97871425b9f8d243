"""Laws of the gate's calibration: no model scores its own training images, few labels guarantee nothing, it resumes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.calibration import SMALL, UNTRAINED, rows

from kmine.config import AdaptConfig, GateConfig
from kmine.methods.mining import mine
from kmine.mining import crossfit, threshold
from kmine.mining.calibration import step
from kmine.mining.calibration.step import calibrate, calibration_summary, fit_calibration
from kmine.segmenters.ellipse import Ellipse
from kmine.types import Candidate, Probs, Prompts


def test_no_image_is_scored_by_a_model_trained_on_it(task_of, monkeypatch):
    trained_on, real, scored = {}, crossfit.fold_model, []

    def fold_model(task, fold_idx, held_out_ids):
        model = real(task, fold_idx, held_out_ids)
        trained_on[id(model)] = set(task.labeled.ids) - set(held_out_ids)
        return model

    def evidence_rows(ctx, ids):
        assert not trained_on[id(ctx.model)] & set(ids)
        scored.extend(ids)
        return iter(())

    monkeypatch.setattr(crossfit, "fold_model", fold_model)
    monkeypatch.setattr(step, "evidence_rows", evidence_rows)
    task, _ = task_of(UNTRAINED, segmenter=Ellipse())
    calibrate(task, task.segmenter)
    assert sorted(scored) == sorted(task.labeled.ids)


def test_an_adapted_segmenter_is_fine_tuned_again_without_each_fold(task_of, monkeypatch):
    trained_on = []

    class Adapted(Ellipse):
        name = "ellipse+adapted"

    def finetuned_without(task, base, examples, held_out, title):
        trained_on.append({sample.sample_id for sample, _ in examples})
        assert {sample.sample_id for sample, _ in held_out} == set(task.val.ids)
        return base

    monkeypatch.setattr(step, "_finetuned_without", finetuned_without)
    task, _ = task_of(UNTRAINED, segmenter=Adapted())
    calibrate(task, Ellipse())
    every = set(task.labeled.ids)
    left_out = [every - ids for ids in trained_on]
    assert len(left_out) == 3 and set().union(*left_out) == every and sum(map(len, left_out)) == len(every)


def with_guarantee(task, holds: bool):
    guarantee = replace(task.calibration.guarantee, holds=holds, threshold=0.95)
    return replace(task, calibration=replace(task.calibration, guarantee=guarantee))


def decided_objects(store):
    return [row for row in store.decisions(1) if row.is_object]


def test_the_gate_keeps_masks_at_or_above_a_guaranteed_threshold(calibrated):
    task, store = calibrated
    list(mine(with_guarantee(task, holds=True)))
    decided = decided_objects(store)
    assert decided and all(0 <= row.estimated_dice <= 1 for row in decided)
    for row in decided:
        assert row.kept == (row.estimated_dice >= 0.95 and row.reason in ("kept", "kept_local"))
        assert row.source in ("both", "segmenter", "local")
    assert not (store.round_dir(1) / "threshold.json").exists(), "a guaranteed threshold is not changed"


def test_without_a_guarantee_the_mean_estimate_reaches_the_target(calibrated):
    task, store = calibrated
    list(mine(with_guarantee(task, holds=False)))
    record, decided = store.read_json(store.round_dir(1) / "threshold.json"), decided_objects(store)
    assert record["threshold"] < 0.95 and record["num_images"] == len(task.unlabeled)
    kept = [row.estimated_dice for row in decided if row.kept]
    assert kept and np.mean(kept) == pytest.approx(record["mean_estimate"]) and np.mean(kept) >= 0.3
    dropped = [row.estimated_dice for row in decided if not row.kept]
    assert min(kept) >= record["threshold"] > max(dropped, default=-1)
    assert sum("on are kept" in line for line in task.progress.said) == 1


def test_the_threshold_is_read_back_after_a_kill(calibrated, monkeypatch):
    task, store = calibrated
    task = with_guarantee(task, holds=False)
    list(mine(task))
    before = list(store.decisions(1))
    (store.round_dir(1) / "decisions.parquet").unlink()
    monkeypatch.setattr(threshold, "threshold_for_mean_estimate", lambda *_: pytest.fail("chosen again"))
    list(mine(task))
    assert str(list(store.decisions(1))) == str(before)


def test_a_finished_calibration_is_read_back_and_a_lost_fold_measured_again(calibrated, monkeypatch):
    task, store = calibrated
    monkeypatch.setattr(step, "_measure", lambda *_: pytest.fail("measured again"))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    monkeypatch.undo()
    lost = store.root / "calibration" / "fold_1.json"
    before = lost.read_bytes()
    lost.unlink()
    measured, real = [], step.evidence_rows
    monkeypatch.setattr(step, "evidence_rows", lambda ctx, ids: measured.append(ids) or real(ctx, ids))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    assert len(measured) == 1 and lost.read_bytes() == before


def test_a_kill_costs_the_fold_at_work_alone(task_of, monkeypatch):
    task, store = task_of(UNTRAINED, segmenter=Ellipse())
    measured, real = [], step.evidence_rows

    def killed_in_the_second_fold(ctx, ids):
        if measured:
            raise KeyboardInterrupt
        measured.append(ids)
        return real(ctx, ids)

    monkeypatch.setattr(step, "evidence_rows", killed_in_the_second_fold)
    with pytest.raises(KeyboardInterrupt):
        calibrate(task, task.segmenter)
    assert [path.name for path in (store.root / "calibration").glob("*.json")] == ["fold_0.json"]
    monkeypatch.setattr(step, "evidence_rows", lambda ctx, ids: measured.append(ids) or real(ctx, ids))
    calibrate(task, task.segmenter)
    assert sorted(i for ids in measured for i in ids) == sorted(task.labeled.ids)


def test_objects_are_ranked_if_set_or_labels_are_few(task_of):
    task, _ = task_of(replace(SMALL, gate=GateConfig(mode="ranked")), segmenter=Ellipse())
    assert calibrate(task, task.segmenter) is task
    few, store = task_of(replace(SMALL, data=replace(SMALL.data, label_fraction=0.1)), "few", segmenter=Ellipse())
    assert calibrate(few, few.segmenter).calibration is None
    assert "too few; objects are ranked by their evidence" in few.progress.said[-1]
    assert not list(store.root.glob("fold_*")), "no model is trained in vain"


def test_summaries_of_guarantees():
    guaranteed = fit_calibration(rows(200), 0.6, 0.9, 0.03, 0)
    assert guaranteed["promise"]["kept"] and guaranteed["rank_correlation"] > 0.9
    assert "guarantees a mean Dice of 0.60 at 90% confidence" in calibration_summary(guaranteed)
    bounded = fit_calibration(rows(20), 0.9, 0.9, 0.03, 0)
    assert not bounded["promise"]["kept"]
    assert calibration_summary(bounded).startswith("too few labels to guarantee a mean Dice of 0.90 at 90% confidence")
    poor = fit_calibration([row | {"dice_segmenter": 0.2, "dice_local": 0.1} for row in rows(20)], 0.9, 0.9, 0.03, 0)
    poor["promise"]["mean"] = None  # as read from JSON
    assert "reaches an estimated Dice of 0.50" in calibration_summary(poor)
    assert fit_calibration(rows(19), 0.6, 0.9, 0.03, 0)["promise"] is None


def test_corrections_count_where_the_mask_of_the_segmenter_is_used():
    """Objects 0 and 1 share an image; agreement tells the segmenter's Dice, .2 above the local model's."""
    pixels = [{"wrong": 10, "corrected": 4, "broken": 1} for _ in range(40)]
    images = ["a", "a", *map(str, range(2, 40))]
    objects = [row | one | {"sample_id": i} for row, one, i in zip(rows(40), pixels, images, strict=True)]
    found = fit_calibration(objects, 0.6, 0.9, 0.03, 0)
    kept = round(found["promise"]["coverage"] * 40)
    assert kept == 40, "the segmenter is better by the margin everywhere"
    assert found["correction"] == pytest.approx([40 * 4 / 390, 40 / 390])
    assert "corrected / newly broken: 41 % / 10 %" in calibration_summary(found)
    undecided = fit_calibration(objects, 0.6, 0.9, 0.5, 0)
    assert undecided["correction"] == [0, 0], "the two masks are intersected"
    assert fit_calibration(objects, 0.6, 0.9, 0.5, 0, ask_local=False)["correction"] == found["correction"]
    older = fit_calibration(rows(40), 0.6, 0.9, 0.03, 0)
    assert older["correction"] is None and "newly broken" not in calibration_summary(older)


def test_pixels_of_an_object_are_counted_within_it():
    local, best = np.array([[0, 1, 1, 0, 0, 1]], bool), np.array([[1, 1, 0, 0, 0, 0]], bool)
    truth = np.array([[1, 1, 1, 0, 1, 0]], np.uint8)
    component = np.array([[0, 1, 1, 0, 0, 0]], bool)  # the last pixel is another object's
    candidate = Candidate(best[None], np.ones(1), np.ones(1), None, best[None][:0])
    probs = Probs("a", np.stack([1.0 - local, local]).astype(np.float32))
    found = step._pixels(probs, Prompts(1, component=component), candidate, truth, 0.75)
    assert found == {"wrong": 3, "corrected": 1, "broken": 1}


def test_each_fold_has_an_auxiliary_model(task_of):
    pair = replace(SMALL, model=replace(SMALL.model, name="unetpp+unet"), adapt=AdaptConfig(folds=3, fold_steps=15))
    task, store = task_of(pair, segmenter=Ellipse())
    assert calibrate(task, task.segmenter).calibration is not None
    assert sorted(path.name for path in store.root.glob("witness_fold_*")) == [f"witness_fold_{n}" for n in range(3)]
    saved = [store.read_json(store.root / "calibration" / f"fold_{n}.json")["objects"] for n in range(3)]
    assert all(saved) and all(0 <= row["witness_dice"] <= 1 for of_fold in saved for row in of_fold)


def test_a_single_fold_gives_no_calibration_and_is_named_as_the_reason(task_of):
    task, store = task_of(replace(SMALL, adapt=AdaptConfig(folds=1)), segmenter=Ellipse())
    assert calibrate(task, task.segmenter).calibration is None
    assert "adapt.folds 1" in task.progress.said[-1] and not list(store.root.glob("fold_*"))
