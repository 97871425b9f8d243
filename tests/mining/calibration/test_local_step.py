"""Laws of the calibration without a segmenter: no model scores its own training images, the gate is not affected."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.calibration import UNTRAINED, rows

from kmine.mining.calibration import local_step
from kmine.mining.calibration.local_quality import LocalQualityEstimator, local_only
from kmine.mining.calibration.local_step import fit_local_calibrator
from kmine.mining.calibration.step import calibrate, fit_calibration
from kmine.mining.candidates import median_object_area
from kmine.segmenters.ellipse import Ellipse
from kmine.training import trainer


def saved(store, name: str = "calibration") -> dict:
    return store.read_json(store.root / "calibration" / f"{name}.json")


def test_an_older_run_only_gains_the_local_calibration(calibrated, monkeypatch):
    task, store = calibrated
    folder = store.root / "calibration"
    before, folds = saved(store), {path: path.read_bytes() for path in folder.glob("fold_*.json")}
    old = {k: v for k, v in before.items() if k not in ("alone", "signature")}
    store.save_json(folder / "calibration.json", old, before["signature"])
    for path in folder.glob("alone_*.json"):
        path.unlink()
    monkeypatch.setattr(trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    assert saved(store) == before and len(folds) == 3
    assert folds == {path: path.read_bytes() for path in folder.glob("fold_*.json")}
    monkeypatch.setattr(local_step, "fold_model", lambda *_: pytest.fail("measured again"))
    calibrate(task, task.segmenter)
    assert saved(store) == before


def test_the_gate_is_calibrated_by_its_own_rows_only(calibrated):
    task, store = calibrated
    objects = [row for n in range(3) for row in saved(store, f"fold_{n}")["objects"]]
    assert not {"dice", "tta"} & set(objects[0])
    cfg = task.cfg.gate
    record = fit_calibration(objects, cfg.target_dice, cfg.confidence, cfg.margin, task.cfg.seed)
    store.save_json(store.root / "calibration" / "again.json", record, saved(store)["signature"])
    again = saved(store, "again")
    assert again["promise"] and again == {name: value for name, value in saved(store).items() if name != "alone"}
    assert "alone" not in task.calibration.to_json(), "it enters the signatures of rounds"


def test_no_image_is_scored_by_a_model_trained_on_it_with_any_augmentation(task_of, monkeypatch):
    trained_on, real, scored = [], local_step.fold_model, []

    def fold_model(task, fold_idx, held_out_ids):
        trained_on.append((real(task, fold_idx, held_out_ids), set(task.labeled.ids) - set(held_out_ids)))
        return trained_on[-1][0]

    def local_rows(task, model, ids, area_prior, tta):
        (known_ids,) = (known_ids for other, known_ids in trained_on if other is model)
        assert not known_ids & set(ids)
        scored.extend((i, tta) for i in ids)
        return iter(())

    monkeypatch.setattr(local_step, "fold_model", fold_model)
    monkeypatch.setattr(local_step, "_rows", local_rows)
    task, store = task_of(UNTRAINED, segmenter=Ellipse())
    calibrate(task, task.segmenter)
    assert sorted(scored) == sorted((i, tta) for i in task.labeled.ids for tta in ("none", "hflip"))
    assert saved(store)["alone"] is None, "without objects there is no estimate"


def test_rows_hold_the_evidence_available_without_a_segmenter(calibrated):
    _, store = calibrated
    objects = [saved(store, f"alone_{n}")["objects"] for n in range(3)]
    plain, flipped = ([row for of_fold in objects for row in of_fold[tta]] for tta in ("none", "hflip"))
    assert plain and flipped
    assert all(row["tta_std"] is None for row in plain) and all(row["tta_std"] >= 0 for row in flipped)
    for row in plain + flipped:
        assert row["predicted_iou"] is row["witness_dice"] is row["jitter_dice"] is None
        assert 0 <= row["dice"] <= 1 and row["area_ratio"] > 0 and 0.5 <= row["confidence_inside"] <= 1
    for tta, entry in saved(store)["alone"]["by_tta"].items():
        assert entry["num_objects"] == len({"none": plain, "hflip": flipped}[tta]) >= 20


def test_the_estimator_has_the_area_prior_of_all_labels(calibrated):
    task, store = calibrated
    record = saved(store)["alone"]
    assert record["by_tta"].keys() <= {"none", "hflip"} and record["num_parts"] == 3
    estimator = LocalQualityEstimator.from_json(record)
    assert estimator.area_prior == median_object_area(task.labeled, task.num_classes)
    assert estimator.calibrators.keys() == record["by_tta"].keys()
    assert estimator.prompts == local_only(task.cfg.prompts)


def test_quality_is_measured_out_of_fold_and_few_objects_give_none():
    many = [row | {"dice": row["dice_segmenter"]} for row in rows(60)]
    fitted = fit_local_calibrator(many, 0)
    assert fitted["num_objects"] == 60 and fitted["rank_correlation"] > 0.9
    assert fitted["mean"]["estimate"] == pytest.approx(fitted["mean"]["dice"], abs=0.05)
    assert fit_local_calibrator(many[:19], 0) is None
    noise = np.random.default_rng(1)
    unrelated = fit_local_calibrator([row | {"dice": float(noise.uniform())} for row in many], 0)
    assert abs(unrelated["rank_correlation"]) < 0.5, "memorised noise does not count"
