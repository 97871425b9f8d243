"""Estimates: laws that hold for any constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.plan_facts import CPU, DATA, SPEED, TINY

from kmine.config import AdaptConfig, FitConfig, GateConfig, InferConfig, LoopConfig
from kmine.plan.estimate import estimate_run

CFG = LoopConfig(rounds=2, infer=InferConfig(tta="flips"))


def seconds(cfg=CFG, data=DATA, speed=SPEED, segmenter=TINY):
    return estimate_run(cfg, data, CPU, speed, segmenter).seconds


def test_without_rounds_only_round_0_is_trained():
    assert set(seconds(replace(CFG, rounds=0))) == {"start", "reading images", "round 0"}
    assert set(seconds(data=replace(DATA, num_unlabeled=0))) == {"start", "reading images", "round 0"}


def test_steps_of_a_stage_cost_their_time():
    more = seconds(replace(CFG, fit=FitConfig(steps=700)))
    assert more["round 0"] - seconds()["round 0"] == pytest.approx(100 * SPEED.step, rel=0.1)
    whole = {"round 0", "fold models", "retraining", "baselines"}
    assert {name for name, took in seconds().items() if more[name] != took} == whole, "one schedule has all the steps"
    folds = more["fold models"] - seconds()["fold models"]
    assert folds == pytest.approx(CFG.adapt.folds * (more["round 0"] - seconds()["round 0"]))
    fixed = replace(CFG, adapt=AdaptConfig(fold_steps=300), fit=FitConfig(steps=300))
    assert seconds(fixed)["fold models"] == seconds(replace(fixed, fit=FitConfig(steps=900)))["fold models"]


def test_models_of_the_parts_are_trained_between_the_rounds():
    for without in ({"crossfit": 1}, {"rounds": 1}):
        assert "models of the parts" not in seconds(replace(CFG, **without))
    one = seconds()["2 rounds: training"] / 2
    assert seconds()["models of the parts"] == pytest.approx(2 * one)
    assert seconds(replace(CFG, rounds=4, crossfit=3))["models of the parts"] == pytest.approx(9 * one)


def test_mining_grows_with_unlabeled_images_and_rounds():
    twice = seconds(data=replace(DATA, num_unlabeled=350))["2 rounds: mining"]
    assert twice == pytest.approx(2 * seconds()["2 rounds: mining"])
    assert seconds(replace(CFG, rounds=4))["4 rounds: mining"] == pytest.approx(twice)


def test_what_a_run_skips_costs_nothing():
    assert {"baselines", "retraining"} <= seconds().keys()
    assert "baselines" not in seconds(replace(CFG, baseline=False))
    assert "retraining" not in seconds(replace(CFG, retrain=False))
    assert "calibration of the gate" not in seconds(replace(CFG, gate=GateConfig(mode="ranked")))
    assert "adaptation of the segmenter" not in seconds(segmenter=replace(TINY, adapt_step=0.0))


def test_the_total_is_the_sum_and_memory_that_of_the_probe_and_more():
    found = estimate_run(CFG, DATA, CPU, SPEED, TINY)
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.peak_gb > SPEED.peak_gb


def test_folds_take_the_time_of_all_runs_and_images_are_read_once():
    one, six = seconds(), seconds(replace(CFG, data=replace(CFG.data, folds=5)))
    assert six.pop("reading images") == one.pop("reading images")
    assert six == {stage: pytest.approx(6 * took) for stage, took in one.items()}
    assert seconds(replace(CFG, data=replace(CFG.data, folds=5, fold=2)))["baselines"] == one["baselines"]
