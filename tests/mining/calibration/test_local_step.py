"""Laws of estimates without a segmenter: nobody judges what it was taught, and the gate never notices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.calibration import SMALL, rows
from helpers.made_up_run import ALONE

from kmine.config import PromptsConfig
from kmine.mining.calibration import local_step as calibration_alone
from kmine.mining.calibration.local_quality import (
    LocalQualityEstimator,
    local_only,
    local_quality_summary,
    score_local_objects,
)
from kmine.mining.calibration.local_step import fit_local_calibrator
from kmine.mining.calibration.step import calibrate, fit_calibration
from kmine.mining.candidates import median_object_area
from kmine.segmenters.ellipse import Ellipse
from kmine.training import trainer as training
from kmine.types import Probs

FLIPPED = replace(SMALL, infer=replace(SMALL.infer, tta="hflip"))


@pytest.fixture
def done(task_of):
    task, store = task_of(FLIPPED, segmenter=Ellipse())
    return calibrate(task, task.segmenter), store


def saved(store) -> dict:
    return store.read_json(store.root / "calibration" / "calibration.json")


def bytes_of(store, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store.root / "calibration").glob(pattern))}


def test_a_finished_run_from_before_is_only_added_to(done, monkeypatch):
    task, store = done
    before, folds = saved(store), bytes_of(store, "fold_*.json")
    path = store.root / "calibration" / "calibration.json"
    store.save_json(path, {k: v for k, v in before.items() if k not in ("alone", "signature")}, before["signature"])
    for old in (store.root / "calibration").glob("alone_*.json"):
        old.unlink()
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained anew"))
    assert calibrate(task, task.segmenter).calibration == task.calibration
    assert saved(store) == before and bytes_of(store, "fold_*.json") == folds and len(folds) == 3
    monkeypatch.setattr(calibration_alone, "fold_model", lambda *_: pytest.fail("asked anew"))
    calibrate(task, task.segmenter)
    assert saved(store) == before


def test_the_gate_goes_by_its_own_rows_alone(done):
    task, store = done
    found = [row for n in range(3) for row in store.read_json(store.root / "calibration" / f"fold_{n}.json")["objects"]]
    assert not {"dice", "tta"} & set(found[0])
    cfg = task.cfg.gate
    told = fit_calibration(found, cfg.target_dice, cfg.confidence, cfg.margin, task.cfg.seed)
    store.save_json(store.root / "again.json", told, saved(store)["signature"])
    again = store.read_json(store.root / "again.json")
    assert again["promise"] and again == {name: value for name, value in saved(store).items() if name != "alone"}
    assert "alone" not in task.calibration.to_json(), "rounds are signed by it"


def test_each_image_is_judged_by_a_model_that_does_not_know_it_with_each_tta(task_of, monkeypatch):
    known, real, seen = {}, calibration_alone.fold_model, []

    def fold_model(task, number, part):
        model = real(task, number, part)
        known[number] = (model, set(task.labeled.ids) - set(part))
        return model

    def judged(task, model, ids, areas, tta):
        (knows,) = (ids_known for other, ids_known in known.values() if other is model)
        assert not knows & set(ids)
        seen.extend((i, tta) for i in ids)
        return iter(())

    monkeypatch.setattr(calibration_alone, "fold_model", fold_model)
    monkeypatch.setattr(calibration_alone, "_rows", judged)
    task, store = task_of(FLIPPED, segmenter=Ellipse())
    calibrate(task, task.segmenter)
    assert sorted(seen) == sorted((i, tta) for i in task.labeled.ids for tta in ("none", "hflip"))
    assert saved(store)["alone"] is None, "no object, no estimate"


def test_evidence_is_what_can_be_had_with_the_same_flips(done):
    task, store = done
    parts = [store.read_json(store.root / "calibration" / f"alone_{n}.json")["objects"] for n in range(3)]
    plain, flipped = ([row for part in parts for row in part[tta]] for tta in ("none", "hflip"))
    assert plain and flipped
    assert all(row["tta_std"] is None for row in plain) and all(row["tta_std"] >= 0 for row in flipped)
    for row in plain + flipped:
        assert row["predicted_iou"] is row["witness_dice"] is row["jitter_dice"] is None
        assert 0 <= row["dice"] <= 1 and row["area_ratio"] > 0 and 0.5 <= row["confidence_inside"] <= 1
    about = saved(store)["alone"]
    assert about["by_tta"].keys() <= {"none", "hflip"} and about["num_parts"] == 3
    alone = LocalQualityEstimator.from_json(about)
    assert alone.area_prior == median_object_area(task.labeled, task.num_classes), (
        "of all labels, as the final model knew"
    )
    assert alone.calibrators.keys() == about["by_tta"].keys() and alone.prompts == local_only(task.cfg.prompts)
    for tta, one in about["by_tta"].items():
        assert one["num_objects"] == len({"none": plain, "hflip": flipped}[tta]) >= 20


def test_an_object_is_judged_by_its_own_pixels():
    prob = np.full((10, 20), 0.1, np.float32)
    prob[2:6, 3:8] = 0.8
    prob[8, 15] = 0.9  # too small
    cfg = local_only(PromptsConfig(min_area_px=2, min_area_fraction=0, box_margin=0))
    (one,) = score_local_objects(Probs("x", np.stack([1 - prob, prob])), cfg, {1: 0.05})
    assert one.prompts.component.sum() == 20 and one.evidence.area_ratio == pytest.approx(20 / 200 / 0.05)
    assert one.evidence.confidence_inside == pytest.approx(0.8)
    # No margin is still 2 px on each side.
    assert one.evidence.confidence_outside == pytest.approx(0.1) and np.isnan(one.evidence.tta_std)
    assert score_local_objects(Probs("x", np.stack([1 - prob * 0, prob * 0])), cfg, {1: 0.05}) == []


def test_what_was_learnt_survives_plain_values_and_estimates_by_them():
    alone = LocalQualityEstimator.from_json(ALONE)
    assert LocalQualityEstimator.from_json(alone.to_json()) == alone
    prob = np.full((10, 20), 0.1, np.float32)
    prob[2:6, 3:8] = 0.8
    probs = Probs("x", np.stack([1 - prob, prob]))
    for tta, expected in (("none", 0.8), ("hflip", 0.4)):
        ((_, estimate),) = alone.estimates(probs, tta)
        assert estimate == pytest.approx(expected)


def test_estimates_are_scored_without_the_object_and_too_few_teach_nothing():
    many = [row | {"dice": row["dice_segmenter"]} for row in rows(60)]
    about = fit_local_calibrator(many, 0)
    assert about["num_objects"] == 60 and about["rank_correlation"] > 0.9
    assert about["mean"]["estimate"] == pytest.approx(about["mean"]["dice"], abs=0.05)
    assert fit_local_calibrator(many[:19], 0) is None
    assert fit_local_calibrator([row | {"dice": None} for row in many], 0) is None
    noise = np.random.default_rng(1)
    blind = fit_local_calibrator([row | {"dice": float(noise.uniform())} for row in many], 0)
    assert abs(blind["rank_correlation"]) < 0.5, "what is learnt by heart does not count"


def test_it_is_said_what_the_estimates_rest_on():
    said = local_quality_summary(ALONE)
    assert "41 objects" in said and "3 models" in said and "knew fewer labels" in said
    assert "mean estimate 0.70 where mean Dice was 0.75" in said
    unknown = ALONE | {"by_tta": {"none": ALONE["by_tta"]["none"] | {"rank_correlation": None}}}
    assert "rank correlation with true Dice unknown" in local_quality_summary(unknown)
