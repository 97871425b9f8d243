"""`python -m kmine.compare RUN ... | SWEEP`: methods on the test split, each compared with a baseline.

The only command that opens the test split; each opening is recorded in the run's run.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Literal

from kmine import cli
from kmine.compare.engine import RunComparison, compare_runs
from kmine.config.checks import LocalPath, expand_paths
from kmine.io.console import say
from kmine.report import comparison
from kmine.report.curve import CurvePoint
from kmine.store.run_folder import RunFolder
from kmine.types import ProgressReporter

DESCRIPTION = """Evaluate finished runs on their test split, and compare each method with a baseline. Of a run of
kmine.loop: the labels alone (round 0), the labels alone for as many steps as mining had (in rounds, and in one
schedule), and mining. Of a sweep: all finished trials. Seeds are averaged; differences are paired by image and seed."""

CASE_COLUMNS = (
    *("run", "arm", "checkpoint", "sample_id", "dice", "iou", "hd95", "num_missed"),
    *("group_id", "model", "label_fraction", "seed", "score"),
)


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `python -m kmine.compare`."""

    runs: list[LocalPath] = field(default_factory=list)
    """Run folders, of several seeds, label fractions or models, with one test split; the folder of data.folds,
    whose folds count as one run; or the folder of a sweep."""
    baseline: str = "auto"
    """The method that all others are compared with; of kmine.loop's runs, supervised is the one at equal steps, and
    supervised_once the same in one schedule; auto: the better of these two on validation."""
    format: Literal["all", "markdown", "csv", "latex", "html"] = "all"
    """What to write besides test_table.md, which is also printed: one of the others, all of them, or nothing more."""
    out: LocalPath | None = None
    """Folder for test_table.md and the other tables; default: that of the first run, or of the sweep."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: LocalPath | None = None
    """Folder that holds the data now, if not where the runs found them; of your own files, their common folder."""

    def __post_init__(self) -> None:
        expand_paths(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog, words = "kmine compare", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(CompareConfig, words, prog=prog, description=DESCRIPTION, positional="runs")
    return cli.guarded(prog, lambda: run_compare(cfg))


def run_compare(cfg: CompareConfig) -> int:
    """Print the table of the runs and write it, with the figures of every case."""
    terminal = cli.Terminal()
    try:
        compared = compare_and_write(cfg, terminal)
    finally:
        terminal.stop()
    say(compared.to_markdown())
    return 0


def compare_and_write(cfg: CompareConfig, progress: ProgressReporter) -> RunComparison:
    """Compare runs and write the tables."""
    compared = compare_runs(
        cfg.runs, baseline=cfg.baseline, device=cfg.device, data_root=cfg.data_root, progress=progress
    )
    with closing(RunFolder(Path(cfg.out or cfg.runs[0]))) as out:
        _write_tables(out, compared, cfg.format)
        if compared.curve:
            _write_curve(out, compared)
        out.write_csv("test_cases.csv", CASE_COLUMNS, _cases(compared))
    return compared


def _write_tables(out: RunFolder, compared: RunComparison, which: str) -> None:
    out.write_text("test_table.md", compared.to_markdown())
    if which in ("all", "csv"):
        out.write_csv("test_table.csv", *comparison.tidy(compared.table))
    if which in ("all", "latex"):
        out.write_text("test_table.tex", compared.to_latex())
    if which in ("all", "html"):
        out.write_text("test_table.html", comparison.html(compared.table))


def _write_curve(out: RunFolder, compared: RunComparison) -> None:
    """Write the label-efficiency curve as a table and as pictures, and the labels saved."""
    out.write_csv("label_efficiency.csv", [f.name for f in fields(CurvePoint)], map(astuple, compared.curve))
    out.write_text("label_efficiency.svg", compared.chart[0])
    out.write_bytes("label_efficiency.png", compared.chart[1])
    rows = [
        (saved.method, saved.model, saved.num_labels, *astuple(saved.needed), saved.num_seeds)
        for saved in compared.labels_saved
    ]
    out.write_csv("labels_saved.csv", ("method", "model", "num_labels", "needed", "low", "high", "num_seeds"), rows)


def _cases(compared: RunComparison) -> Iterator[list[object]]:
    """One row per method, checkpoint and image; empty where there is no number."""
    for result in compared.results:
        for checkpoint, metrics in (("chosen", result.chosen), ("final", result.final)):
            for case in metrics.cases:
                figures = (case.dice, case.iou, case.hd95, case.num_missed)
                yield (
                    [result.run, result.method, checkpoint, case.sample_id]
                    + ["" if value != value else value for value in figures]
                    + [result.groups[case.sample_id], result.model, result.label_fraction, result.seed, case.score]
                )


if __name__ == "__main__":
    sys.exit(main())
