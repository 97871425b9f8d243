"""Comparison of methods on the test split as data; needs no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from kmine import cli
from kmine.compare.runs import find_runs, refuse_mixtures
from kmine.compare.table import LabelsSaved, Result, join_folds, label_curve, tabulate, with_labels_saved
from kmine.report import comparison
from kmine.report.comparison import Comparison
from kmine.report.curve import CurvePoint, label_efficiency
from kmine.report.figures import svg_file
from kmine.types import ProgressReporter

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunComparison:
    """Test figures of several runs and their differences to a baseline."""

    table: Comparison
    results: list[Result]
    """One per method, model, label fraction and seed, with metrics per image."""
    curve: list[CurvePoint]
    """Label-efficiency curve; empty with one label fraction."""
    labels_saved: list[LabelsSaved]
    chart: tuple[str, bytes]
    """The curve as SVG and PNG; empty with one label fraction."""

    def to_pandas(self) -> pd.DataFrame:
        """A row per method, model and label fraction; NaN where there is no number."""
        import pandas as pd

        return pd.DataFrame(self.table.rows)

    def to_markdown(self) -> str:
        """Notes and table as Markdown."""
        return comparison.markdown(self.table)

    def to_latex(self) -> str:
        """Table environment for the LaTeX package booktabs."""
        return comparison.latex(self.table)


def compare_runs(
    runs: Sequence[str | Path],
    *,
    baseline: str = "auto",
    device: str = "auto",
    data_root: str | None = None,
    progress: ProgressReporter | None = None,
) -> RunComparison:
    """Evaluate finished runs on their test split and compare each method with a baseline.

    Test figures are kept in the run folders; each opening of a test split is recorded in run.json.

    Args:
        runs: run folders with one test split, or folders of folds or sweeps.
        baseline: method that the others are compared with; `supervised` of a run of `kmine loop` is that at equal
            steps, `supervised_once` that in one schedule; `auto` is the better of the two on validation.
        device: auto, cpu, cuda or cuda:N.
        data_root: folder that holds the data now; None: where the runs found them.
        progress: receives the progress; None is silent.

    Raises:
        UserError: a folder without a finished run, runs that do not belong in one table, an unknown baseline.
    """
    compared, notes = find_runs(runs, device, data_root)
    refuse_mixtures(compared)
    from kmine.compare.evaluation import evaluate_run  # torch; after the checks that need none

    progress = progress or cli.Terminal(quiet=True)
    folders = groupby(compared, key=lambda run: id(run.folds or run))  # the runs of a folder of folds share the list
    results = [r for _, runs in folders for r in join_folds([evaluate_run(run, progress) for run in runs])]
    curve, saved = label_curve(results, baseline)
    table = with_labels_saved(tabulate(results, baseline, notes), saved)
    chart = label_efficiency(curve, f"{compared[0].info.get('dataset', 'test split')}, segmenter {table.segmenter}")
    return RunComparison(replace(table, chart=chart[0]), results, curve, saved, (svg_file(chart[0]), chart[1]))
