"""The engine: the reason of the end in terminal, run.json and report; small and odd data."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.loop_command import (
    FEW_STEPS,
    OPEN_GATE,
    SMALL,
    UNET,
    run_loop,
)

from kmine.compare import __main__ as compare
from kmine.training import evaluation as scoring
from kmine.types import STOPPED_BY, Metrics, RoundResult, stopped_by

TINY = SMALL | UNET | FEW_STEPS | OPEN_GATE | {"adopt_tolerance": 1, "refine.ask_local": "false"}


def run(out: Path, **changes: object) -> int:
    return run_loop(TINY, out, **changes)


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def ended(out: Path, capsys: pytest.CaptureFixture[str], reason: str) -> str:
    """Output on stderr of a run that ended for `reason`, which run.json and the report name too."""
    assert json.loads((out / "run.json").read_text())["stopped_by"] == reason
    assert STOPPED_BY[reason] in (out / "report.html").read_text()
    err = capsys.readouterr().err
    assert STOPPED_BY[reason] in err and "Traceback" not in err
    return err


def of(*rounds: tuple[int, bool]) -> list[RoundResult]:
    """Results by (number of pseudo masks, whether adopted)."""
    none = Metrics((), 0.5, 0.5, 0.0, 0, 0)
    return [RoundResult(n, 3, num, none, none, adopted, {}) for n, (num, adopted) in enumerate(rounds)]


@pytest.mark.parametrize(
    ("rounds", "requested", "reason"),
    [
        ([(0, True)], 0, "rounds"),
        ([(0, True), (4, True)], 1, "rounds"),
        ([(0, True), (4, False), (4, False)], 2, "rounds"),
        ([(0, True), (4, False), (4, False)], 3, "refused_twice"),
        ([(0, True), (0, False)], 1, "no_pseudo_masks"),
        ([(0, True), (4, False), (0, False)], 3, "no_pseudo_masks"),
    ],
)
def test_the_reason_follows_from_the_rounds(rounds, requested, reason):
    assert stopped_by(of(*rounds), requested) == reason


def test_two_refused_rounds_end_the_run_and_the_baseline_trains_as_many(tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "run", scoring.evaluate_checkpoint
    scores = iter([0.5] * 2 + [0.1] * 4 + [0.5] * 100)  # round 0, the two refused ones, the baseline

    def evaluate_on(*args, **more):
        found, score = real(*args, **more), next(scores)
        return replace(found, dice=score, cases=tuple(replace(case, dice=score) for case in found.cases))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "evaluate_checkpoint", evaluate_on)
        assert run(out, rounds=5, adopt_tolerance=0.05, baseline="true") == 0
    assert "stopped after round 2 of 5: two rounds in a row were refused" in ended(out, capsys, "refused_twice")
    assert [row["adopted"] for row in results(out)] == ["True", "False", "False"]
    assert sorted(p.name for p in (out / "supervised").iterdir()) == ["round_01", "round_02"]
    assert compare.main([str(out)]) == 0


def test_results_count_the_images_that_were_added_and_removed(tmp_path, capsys):
    assert run(tmp_path / "run", rounds=2) == 0
    said = ended(tmp_path / "run", capsys, "rounds")
    first, second, third = results(tmp_path / "run")
    assert (first["num_new"], first["changed_pixels"]) == ("", "")
    assert int(second["num_new"]) == int(second["num_pseudo"]) > 0 and second["num_expelled"] == "0"
    came = int(third["num_new"]) + int(third["num_readmitted"]) - int(third["num_expelled"])
    assert int(third["num_pseudo"]) == int(second["num_pseudo"]) + came
    told = json.loads((tmp_path / "run" / "round_01" / "changes.json").read_text())
    assert float(second["changed_pixels"]) == pytest.approx(told["changed_pixels"], abs=1e-6)
    assert f"the segmenter changed {100 * told['changed_pixels']:.1f} % of the object pixels" in said
    assert f"Round 2: {third['num_pseudo']} of " in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_finds_no_object_ends_the_run_with_a_cure(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, prompts__min_area_px=10**6) == 0
    said = ended(out, capsys, "no_pseudo_masks")
    assert "the local model found no object in any image: train it longer (--fit.steps)" in said
    assert [row["num_pseudo"] for row in results(out)] == ["0", "0"]


def test_one_labeled_image_suffices(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, data__label_fraction=0.07) == 0
    assert "phantom: 1 labeled" in ended(out, capsys, "rounds")
    assert [row["num_labeled"] for row in results(out)] == ["1", "1"]


def test_sks_brings_the_baseline_model_into_results_report_and_comparison(tmp_path):
    sks = {"model.name": "sks", "classifier.steps": 2, "classifier.batch_size": 4, "model.veto": "true"}
    data = {"data.kind": "ct", "data.num_samples": 40, "data.val_fraction": 0.3}
    settings = SMALL | FEW_STEPS | OPEN_GATE | sks | data
    assert run_loop(settings, tmp_path / "run", rounds=0, baseline="true") == 0
    folder = tmp_path / "run" / "unetpp_labels_only" / "round_00"
    first = (folder / "model.safetensors").stat().st_mtime_ns
    (row,) = results(tmp_path / "run")
    assert {"unetpp_dice", "unetpp_dice_lesion", "unetpp_false_alarm_rate"} <= row.keys() and row["unetpp_dice_lesion"]
    assert "unetpp (labels only)" in (tmp_path / "run" / "report.html").read_text()
    assert run_loop(settings, tmp_path / "run", rounds=0, baseline="true") == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == first, "read back"
    assert compare.main([str(tmp_path / "run"), "--baseline", "unetpp"]) == 0
    table = (tmp_path / "run" / "test_table.md").read_text()
    assert "unetpp (labels only)" in table and "supervised, round 0" in table
    assert run_loop(settings, tmp_path / "none", rounds=0) == 0
    assert not (tmp_path / "none" / "unetpp_labels_only").exists(), "--baseline false turns all baselines off"
