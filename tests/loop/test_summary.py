"""Rows of results.csv and the notes and gallery of report.html, by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kmine.loop import summary
from kmine.ops.metrics import summarise
from kmine.store.run_folder import RunFolder
from kmine.types import CaseMetrics, Evidence, Metrics, RoundResult

METRICS = Metrics((), 0.5, 0.4, 3.0, 2, 9)
FIRST = RoundResult(0, 4, 0, METRICS, replace(METRICS, dice=0.45), True, {"training": 1.5})
SECOND = RoundResult(1, 4, 3, METRICS, METRICS, False, {"mining": 2.0}, "refused: fell by 0.1", -0.1, -0.2, 0.0)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.update_run(segmenter="ellipse")
    yield folder
    folder.close()


def task_of(run: RunFolder, num_val: int = 30):
    cfg = SimpleNamespace(rounds=3, adopt_tolerance=0.01)
    return SimpleNamespace(run=run, cfg=cfg, unlabeled=range(6), val=range(num_val))


def test_a_row_has_the_figures_of_both_checkpoints_and_of_the_baseline(run):
    baseline = replace(SECOND, metrics=replace(METRICS, dice=0.7), adopted=True)
    first, second = summary.round_rows(task_of(run), [FIRST, SECOND], {"supervised": [baseline]})
    assert (first.dice, first.dice_final, first.iou, first.hd95, first.num_missed) == (0.5, 0.45, 0.4, 3.0, 2)
    assert math.isnan(first.coverage) and first.supervised_dice is None and first.num_new is None
    assert (second.coverage, second.supervised_dice, second.supervised_adopted) == (0.5, 0.7, True)
    assert (second.reason, second.difference, second.difference_high) == ("refused: fell by 0.1", -0.1, 0.0)
    assert (second.round_idx, second.num_labeled, second.num_pseudo, second.adopted) == (1, 4, 3, False)
    assert second.seconds == {"mining": 2.0} and second.reasons == {}


def test_corrections_are_those_of_an_audit_and_else_unknown(run):
    assert [row.correction for row in summary.round_rows(task_of(run), [FIRST, SECOND])] == ["–", "–"]
    run.update_run(corrections={"masks of today": "46 % / 8 %", "older masks": "1 % / 1 %"})
    run.round_signature = ["", "masks of today"].__getitem__
    first, second = summary.round_rows(task_of(run), [FIRST, SECOND])
    assert (first.correction, second.correction) == ("–", "46 % / 8 %")
    assert "46 %" not in str(summary._provenance({"corrections": {"1": "46 % / 8 %"}}))


def test_unknown_values_are_empty_cells_of_results_csv(run):
    summary.write_results(run, summary.round_rows(task_of(run), [FIRST, SECOND]))
    first, second = run.read_csv("results.csv")
    assert (first["round"], first["segmenter"], second["segmenter"]) == ("0", "", "ellipse")
    assert (first["dice"], first["supervised_dice"], first["difference"]) == ("0.500000", "", "")
    assert (second["difference"], second["adopted"], second["num_expelled"]) == ("-0.100000", "False", "")
    assert (first["seconds_training"], first["seconds_mining"]) == ("1.500000", "")
    assert list(first)[-3:] == ["segmenter", "seconds_mining", "seconds_training"]


def test_without_a_segmenter_its_name_is_none(tmp_path):
    folder = RunFolder(tmp_path / "empty")
    assert summary.segmenter_name(folder) == "none"
    folder.close()


def test_warnings_are_apart_from_news_and_the_weightiest_comes_first(run):
    run.update_run(stopped_by="refused_twice", skipped=[{}])
    rows = summary.round_rows(task_of(run), [FIRST, SECOND])
    few, stand_in, skipped = summary._warnings(task_of(run, num_val=19), rows, "ellipse")
    assert few[0] == "Validation holds only 19 images: differences of a few points are noise" and "folds" in few[1]
    assert (
        stand_in[0].startswith("The segmenter: the ellipse inscribed in the box, a stand-in")
        and "sam_vit_b" in stand_in[1]
    )
    assert skipped[0] == "1 files were left out"
    assert len(summary._warnings(task_of(run), rows, "sam_vit_b")) == 1
    notes = summary._notes(task_of(run, num_val=19), rows)
    assert notes[0].startswith("Round 1 was refused: fell by 0.1 in validation Dice")
    assert "no fall is tolerated. The next round started" in notes[0]
    assert notes[1] == "The run keeps the model of round 0, of those adopted the best on validation."
    assert notes[2].startswith("The loop stopped after round 1 of 3: ") and len(notes) == 3
    assert summary._notes(task_of(run), rows[:1])[0].startswith("The loop stopped after round 0 of 3")


def test_a_gate_without_a_guarantee_is_a_warning_and_one_with_it_is_news(run):
    path = run.root / "calibration" / "calibration.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"promise": None, "num_objects": 3}))
    rows = summary.round_rows(task_of(run), [FIRST])
    ((text, cure),) = summary._warnings(task_of(run), rows, "sam_vit_b")
    assert text.startswith("The gate: the gate is not calibrated") and cure
    assert not any("gate" in note for note in summary._notes(task_of(run), rows))
    path.write_text(json.dumps({"promise": None, "num_objects": 3, "num_parts": 0}))
    ((text, cure),) = summary._warnings(task_of(run), rows, "sam_vit_b")
    assert "3 objects of labeled images are too few" in text and cure.startswith("label more"), "folds would not do"
    path.write_text(json.dumps({"promise": None, "num_objects": 20, "num_parts": 0}))
    ((text, cure),) = summary._warnings(task_of(run), rows, "sam_vit_b")
    assert "with adapt.folds 1" in text and cure.startswith("--adapt.folds 5 with another --out")


def test_a_calibration_without_a_promise_has_no_chart(run):
    path = run.root / "calibration" / "calibration.json"
    path.parent.mkdir()
    assert summary._calibrated(run) is None
    path.write_text(json.dumps({"promise": None}))
    assert summary._calibrated(run) is None
    curves = {"risk_coverage": [[0.5, 0.1]], "reliability": [[0.7, 0.6, 4]]}
    path.write_text(json.dumps({"promise": {"coverage": 0.5}, "target": 0.8, **curves}))
    chart = summary._calibrated(run)
    assert (chart.coverage, chart.target) == (0.5, 0.8)


def test_the_score_of_an_image_is_that_of_its_worst_object():
    good = Evidence(predicted_iou=0.9, stability_score=0.7)
    poor = Evidence(predicted_iou=0.4)
    rows = [SimpleNamespace(evidence=evidence) for evidence in (good, poor)]
    assert summary._score(rows[:1]) == pytest.approx(0.8) and summary._score(rows) == pytest.approx(0.4)
    assert summary._score([SimpleNamespace(evidence=Evidence())]) == 0


def rounds_of(*dice: tuple[float, ...]) -> list[RoundResult]:
    """Adopted rounds with the Dice of images i0, i1, ..., and a refused one after them."""
    metrics = [summarise(CaseMetrics(f"i{n}", d, d, 1.0, 0) for n, d in enumerate(row)) for row in dice]
    adopted = [replace(SECOND, round_idx=n, metrics=one, adopted=True) for n, one in enumerate(metrics)]
    return [*adopted, replace(SECOND, metrics=replace(metrics[0], cases=()), adopted=False)]


def test_the_gain_is_paired_by_image_with_groups_and_an_interval():
    """20 groups of two images: +.1 in the first, and of the second, clean one a false alarm is gone in half of them."""
    task = SimpleNamespace(val=SimpleNamespace(group_of=lambda i: f"g{int(i[1:]) // 2}"))
    mined = rounds_of((0.0,) * 40, (0.6, math.nan) * 20)
    other = rounds_of((0.5, math.nan, 0.5, 0.0) * 10)
    gain = summary.gain_over(task, mined, other)
    assert gain.difference == pytest.approx((20 * 0.1 + 10) / 40) and gain.num_pairs == 40
    sd = 0.25 * math.sqrt(20 / 19)  # groups gain .05 or .55 an image
    assert gain.high - gain.difference == pytest.approx(2.0930 * sd / math.sqrt(20), rel=1e-3)


def test_no_gain_is_claimed_from_few_groups_or_without_a_baseline():
    task = SimpleNamespace(val=SimpleNamespace(group_of=lambda i: f"g{int(i[1:]) % 19}"))
    mined = rounds_of((0.5,) * 40, (0.6,) * 40)
    assert summary.gain_over(task, mined, rounds_of((0.5,) * 40)) is None
    assert summary.gain_over(task, mined, []) is None


def test_rows_have_the_figures_of_clean_images(run):
    cases = [CaseMetrics("a", 0.5, 0.4, 1.0, 0, ((2, 4, 4),)), CaseMetrics("b", math.nan, 0, 1, 0, ((0, 0, 0),))]
    metrics = [
        summarise([*cases, replace(cases[1], dice=dice, counts=((0, n, 0),))]) for n, dice in ((0, math.nan), (3, 0.0))
    ]
    own, other = (replace(SECOND, metrics=one, adopted=True) for one in metrics)
    (row,) = summary.round_rows(task_of(run), [own], {"supervised": [other]})
    assert (row.dice, row.num_empty, row.dice_lesion, row.num_clean, row.false_alarm_rate) == (0.5, 2, 0.5, 2, 0.0)
    assert (row.supervised_dice, row.supervised_dice_lesion, row.supervised_false_alarm_rate) == (0.25, 0.5, 0.5)
