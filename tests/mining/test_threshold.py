"""The gate's threshold of a round: that of a guarantee, or one selected on pilot images."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG, context

from kmine.config import GateConfig
from kmine.mining import threshold
from kmine.mining.threshold import round_signature, select_threshold
from kmine.ops.calibrator import FEATURES, Calibration, Calibrator, RiskGuarantee
from kmine.training.checkpoints import Checkpoints
from kmine.types import Decision, Evidence


def constant(dice: float) -> Calibrator:
    zeros = (0.0,) * len(FEATURES)
    return Calibrator(zeros, zeros, zeros, 0.0, ((0.0, dice), (1.0, dice)))


def calibration(*, holds: bool) -> Calibration:
    return Calibration(constant(0.5), constant(0.0), RiskGuarantee(0.9, holds, 0.8, 0.85, 0.5, 30))


def round_of(task, *, holds: bool | None = None, **settings):
    """The context of a round, calibrated unless `holds` is None."""
    return context(replace(task, calibration=None if holds is None else calibration(holds=holds)), **settings)


@pytest.fixture
def task(task_of):
    return replace(task_of(replace(CFG, gate=GateConfig(target_dice=0.6)))[0], mining_batch_size=4)


@pytest.fixture
def pilot(monkeypatch):
    """Estimates .2, .6 and .8 of pilot images; their ids are recorded, and no model is run."""
    calls: list[list[str]] = []
    found = [Decision(True, "kept", Evidence(predicted_iou=value), value) for value in (0.2, 0.6, 0.8)]
    monkeypatch.setattr(threshold, "_pilot_decisions", lambda ctx, ids: calls.append(ids) or found)
    return calls


def test_with_a_guarantee_or_where_everything_is_kept_nothing_is_selected(task, pilot):
    everything = replace(task, cfg=replace(task.cfg, gate=GateConfig(keep=1.0)))
    assert select_threshold(round_of(everything)) is None
    ctx = round_of(task, holds=True)
    assert select_threshold(ctx) is ctx.task.calibration and pilot == []


def test_without_a_guarantee_the_mean_estimate_reaches_the_target(task, pilot):
    ctx = round_of(task, holds=False)
    selected = select_threshold(ctx)
    expected = replace(ctx.task.calibration.guarantee, threshold=0.6)
    assert selected.guarantee == expected, "mean .7, with .2 it is .53"
    record = task.run.read_json(task.run.round_dir(1) / "threshold.json")
    assert (record["threshold"], record["target"], record["num_images"]) == (0.6, 0.6, len(task.unlabeled))
    assert select_threshold(ctx) == selected and len(pilot) == 1, "read back"
    select_threshold(replace(ctx, signature="other"))
    assert len(pilot) == 2, "of another signature"


def test_without_a_calibration_the_best_by_evidence_are_kept(task, pilot):
    ranking = select_threshold(round_of(task))
    scores = ranking.scores([Evidence(predicted_iou=value) for value in (0.2, 0.6, 0.8)])
    assert (scores >= ranking.threshold).tolist() == [False, True, True], "two of three are half of them, or more"
    record = task.run.read_json(task.run.round_dir(1) / "threshold.json")
    assert (record["keep"], record["num_objects"], record["num_images"]) == (0.5, 3, len(task.unlabeled))
    assert task.progress.said[-1].startswith("round 1: the best 50% by their evidence are kept, measured on 3 objects")
    assert select_threshold(round_of(task)) == ranking and len(pilot) == 1, "read back"


def test_pilot_images_are_unreviewed_and_depend_on_the_round(task, pilot, monkeypatch):
    monkeypatch.setattr(threshold, "NUM_PILOT_IMAGES", 3)
    rejected = frozenset(task.unlabeled.ids[:4])
    task = replace(task, review=replace(task.review, rejected=rejected))
    for round_idx in (1, 2):
        select_threshold(round_of(task, holds=False, round_idx=round_idx))
    first, second = pilot
    assert len(first) == len(second) == 3 and first != second and not rejected & {*first, *second}
    assert first == [i for i in task.unlabeled.ids if i in first], "in the order of the pool"


def test_a_round_is_signed_by_models_segmenter_settings_and_verdicts(task):
    student = Checkpoints("student", {}, {}, 0.0)
    cfg = task.cfg
    others = [
        round_signature(task, replace(student, signature="other")),
        round_signature(task, student, "auxiliary"),
        round_signature(replace(task, calibration=calibration(holds=True)), student),
        round_signature(replace(task, review=replace(task.review, signature="verdicts")), student),
        round_signature(replace(task, cfg=replace(cfg, gate=replace(cfg.gate, keep=0.9))), student),
        round_signature(replace(task, cfg=replace(cfg, refine=replace(cfg.refine, min_vote=0.9))), student),
        round_signature(task, student, parts=[replace(student, signature="part")]),
    ]
    assert len({round_signature(task, student), *others}) == 8
    assert round_signature(task, student, parts=[student]) == round_signature(task, student), "as in round 1"
    assert round_signature(replace(task, cfg=replace(cfg, rounds=9)), student) == round_signature(task, student)
