"""Comparison of runs as data, with the evaluation replaced by given figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmine.compare import engine, evaluation
from kmine.compare.runs import ComparedRun
from kmine.compare.table import Result
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.ops.metrics import summarise
from kmine.report.figures import svg_file
from kmine.types import CaseMetrics

DICE = {"supervised": 0.5, "oracle": 0.75}


def result(method: str, fraction: float) -> Result:
    cases = summarise(CaseMetrics(f"i{n}", DICE[method] + fraction + n / 100, 0.5, 1.0, 0) for n in range(8))
    groups = {case.sample_id: case.sample_id for case in cases.cases}
    return Result("runs/a", method, "unet", fraction, int(100 * fraction), 0, "none", cases, cases, groups)


@pytest.fixture
def compare(monkeypatch):
    """Compares the two methods at the given label fractions."""

    def compare(*fractions: float, baseline: str = "supervised") -> engine.RunComparison:
        runs = [ComparedRun(Path(f"{f}"), {"dataset": "toy"}, LoopConfig(), {}, [], None) for f in fractions]
        figures = {run.root: [result(name, f) for name in DICE] for run, f in zip(runs, fractions, strict=True)}
        monkeypatch.setattr(engine, "find_runs", lambda *_: (runs, ["One trial failed."]))
        monkeypatch.setattr(evaluation, "evaluate_run", lambda run, _: figures[run.root])
        return engine.compare_runs(["unused"], baseline=baseline)

    return compare


def test_one_label_fraction_has_a_table_and_no_curve(compare):
    found = compare(0.1)
    assert [row.method for row in found.table.rows] == ["supervised", "oracle (true masks: a ceiling)"]
    assert found.table.rows[1].difference == pytest.approx(0.25)
    assert (found.curve, found.labels_saved, found.chart) == ([], [], ("", b""))
    assert "One trial failed." in found.table.notes and "One trial failed." in found.to_markdown()


def test_several_label_fractions_have_a_curve_and_its_chart(compare):
    found = compare(0.1, 0.2)
    assert (
        sorted((point.label_fraction, point.num_labels) for point in found.curve) == [(0.1, 10)] * 2 + [(0.2, 20)] * 2
    )
    assert found.chart[0] == svg_file(found.table.chart) and "toy, segmenter none" in found.chart[0]
    assert found.chart[0].startswith("<svg xmlns=") and found.chart[1].startswith(b"\x89PNG")


def test_the_frame_has_a_row_per_method_and_fraction(compare):
    frame = compare(0.1, 0.2).to_pandas()
    assert len(frame) == 4 and frame["is_baseline"].sum() == 2
    assert frame["dice"].max() == pytest.approx(0.75 + 0.2 + 0.035)


def test_an_unknown_baseline_is_refused_and_another_method_can_be_one(compare):
    assert compare(0.1, baseline="oracle").table.baseline == "oracle"
    with pytest.raises(UserError, match="did you mean oracle"):
        compare(0.1, baseline="oracel")
