"""Laws of the gate's calibration: nobody judges what it was taught, few labels promise nothing, a kill costs a part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.calibration import SMALL, rows

from kmine.config import AdaptConfig, GateConfig
from kmine.methods.mining import mine
from kmine.mining import threshold
from kmine.mining.calibration import step as calibration
from kmine.mining.calibration.step import calibrate, calibration_summary, fit_calibration
from kmine.segmenters.ellipse import Ellipse


@pytest.fixture
def done(task_of):
    task, store = task_of(SMALL, segmenter=Ellipse())
    return calibrate(task, task.segmenter), store


def test_every_object_is_judged_by_models_that_do_not_know_its_image(task_of, monkeypatch):
    known, real, seen = {}, calibration.fold_model, []

    def fold_model(task, number, part):
        model = real(task, number, part)
        known[id(model)] = set(task.labeled.ids) - set(part)
        return model

    def mined(ctx, ids):
        assert not known[id(ctx.model)] & set(ids)
        seen.extend(ids)
        return iter(())

    monkeypatch.setattr(calibration, "fold_model", fold_model)
    monkeypatch.setattr(calibration, "_evidence_rows", mined)
    task, _store = task_of(SMALL, segmenter=Ellipse())
    calibrate(task, task.segmenter)
    assert sorted(seen) == sorted(task.labeled.ids)


def test_a_segmenter_that_learns_is_taught_anew_without_each_part(task_of, monkeypatch):
    taught = []

    class Learner(Ellipse):
        name = "learner+adapted"

    def teach(task, base, examples, held_out, title):
        taught.append({sample.sample_id for sample, _ in examples})
        return base

    monkeypatch.setattr(calibration, "_finetuned_without", teach)
    task, _store = task_of(SMALL, segmenter=Learner())
    calibrate(task, Ellipse())
    everything = set(task.labeled.ids)
    parts = [everything - one for one in taught]
    assert len(parts) == 3 and set().union(*parts) == everything and sum(map(len, parts)) == len(everything)


def promised(task, kept: bool):
    found = replace(task.calibration, guarantee=replace(task.calibration.guarantee, kept=kept, threshold=0.95))
    return replace(task, calibration=found)


def objects_of(store):
    return [row for row in store.decisions(1) if row.is_object]


def test_the_gate_goes_by_it_and_every_decision_says_its_estimates(done):
    task, store = done
    assert task.calibration is not None
    list(mine(promised(task, kept=True)))
    rows = objects_of(store)
    assert rows and all(0 <= row.estimated_dice <= 1 for row in rows)
    for row in rows:
        assert row.kept == (row.estimated_dice >= 0.95 and row.reason in ("kept", "kept_local"))
        assert row.source in ("both", "segmenter", "local")
    assert not (store.round_dir(1) / "threshold.json").exists(), "what is promised is not moved"


def test_where_nothing_is_promised_the_mean_estimate_reaches_the_target(done):
    task, store = done
    list(mine(promised(task, kept=False)))
    about, rows = store.read_json(store.round_dir(1) / "threshold.json"), objects_of(store)
    assert about["threshold"] < 0.95 and about["num_images"] == len(task.unlabeled), "so few are all looked at"
    kept = [row.estimated_dice for row in rows if row.kept]
    assert kept and np.mean(kept) == pytest.approx(about["mean_estimate"]) and np.mean(kept) >= 0.3
    assert min(kept) >= about["threshold"] > max([r.estimated_dice for r in rows if not r.kept], default=-1)
    assert sum("on are kept" in said for said in task.progress.said) == 1


def test_the_threshold_is_read_back_after_a_kill(done, monkeypatch):
    task, store = done
    task = promised(task, kept=False)
    list(mine(task))
    before = store.decisions(1)
    (store.round_dir(1) / "decisions.parquet").unlink()
    monkeypatch.setattr(threshold, "threshold_for_mean_estimate", lambda *_: pytest.fail("settled anew"))
    list(mine(task))
    assert str(store.decisions(1)) == str(before)


def test_it_is_read_back_and_what_a_kill_left_is_gone_on_with(done, task_of, monkeypatch):
    task, store = done
    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured anew"))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    monkeypatch.undo()
    before = (store.root / "calibration" / "fold_1.json").read_bytes()
    (store.root / "calibration" / "fold_1.json").unlink()
    measured, real = [], calibration._evidence_rows
    monkeypatch.setattr(calibration, "_evidence_rows", lambda ctx, ids: measured.append(ids) or real(ctx, ids))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    assert len(measured) == 1 and (store.root / "calibration" / "fold_1.json").read_bytes() == before


def test_thresholds_decide_where_that_is_asked_or_labels_are_few(task_of):
    task, store = task_of(replace(SMALL, gate=GateConfig(mode="thresholds")), segmenter=Ellipse())
    assert calibrate(task, task.segmenter) is task
    few, store = task_of(replace(SMALL, data=replace(SMALL.data, label_fraction=0.1)), "few", segmenter=Ellipse())
    assert calibrate(few, few.segmenter).calibration is None
    assert "too few; its thresholds decide" in few.progress.said[-1]
    assert not list(store.root.glob("fold_*")), "nothing is trained to find that out"


def test_what_is_said_of_the_promise():
    kept = fit_calibration(rows(200), 0.6, 0.9, 0.03, 0)
    assert kept["promise"]["kept"] and kept["rank_correlation"] > 0.9
    assert "promises a mean Dice of 0.60 at 90% confidence" in calibration_summary(kept)
    broken = fit_calibration(rows(20), 0.9, 0.9, 0.03, 0)
    assert not broken["promise"]["kept"]
    assert calibration_summary(broken).startswith("not enough labels to promise a mean Dice of 0.90 at 90% confidence")
    poor = fit_calibration([row | {"dice_segmenter": 0.2, "dice_local": 0.1} for row in rows(20)], 0.9, 0.9, 0.03, 0)
    poor["promise"]["mean"] = None  # as it comes back from JSON
    assert "reaches an estimated Dice of 0.50" in calibration_summary(poor)
    assert fit_calibration([row | {"dice_segmenter": None} for row in rows(50)], 0.6, 0.9, 0.03, 0)["promise"] is None


def test_each_part_has_a_witness_of_its_own(task_of):
    task, store = task_of(replace(SMALL, model=replace(SMALL.model, name="unetpp+unet")), segmenter=Ellipse())
    made = calibrate(task, task.segmenter)
    assert sorted(path.name for path in store.root.glob("witness_fold_*")) == [f"witness_fold_{n}" for n in range(3)]
    rows = [row for n in range(3) for row in store.read_json(store.root / "calibration" / f"fold_{n}.json")["objects"]]
    assert rows and all(0 <= row["witness_dice"] <= 1 for row in rows)
    assert made.calibration is not None


def test_a_single_part_is_no_calibration_and_said_to_be_the_reason(task_of):
    task, store = task_of(replace(SMALL, adapt=AdaptConfig(folds=1)), segmenter=Ellipse())
    assert calibrate(task, task.segmenter).calibration is None
    assert "adapt.folds 1" in task.progress.said[-1] and not list(store.root.glob("fold_*"))
