"""`python -m kmine.loop`: the command line of `kmine.loop.engine`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmine import cli
from kmine.config import MAIN_SETTINGS, LoopConfig
from kmine.config.sweep import MINING
from kmine.data import DATASETS
from kmine.io.console import duration
from kmine.ops.statistics import Paired
from kmine.setup.preflight import preflight
from kmine.types import STOPPED_BY

if TYPE_CHECKING:
    from kmine.loop.engine import LoopResults
    from kmine.report.comparison import Comparison

DESCRIPTION = """Train a local model on the few masks, mine pseudo masks with a promptable segmenter on the unlabeled
images, retrain, and repeat. Without settings: procedural phantom images, minutes on two CPU cores, no download.
The same command again resumes where it stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine loop"
    words = sys.argv[1:] if argv is None else argv
    cfg = cli.parse(LoopConfig, words, prog=prog, description=DESCRIPTION, main=MAIN_SETTINGS)
    given = frozenset(cli.GIVEN)
    return cli.guarded(prog, lambda: run_loop(cfg, given))


def run_loop(cfg: LoopConfig, given: Collection[str] | None = None) -> int:
    """Run or resume the loop of `cfg` and print its results; in a distributed launch only the first process prints.

    With the names of the settings that were `given`, `kmine.plan` chooses others.
    """
    is_distributed = "TORCHELASTIC_RUN_ID" in os.environ  # set by torchrun
    began = time.perf_counter()
    # Errors that need no torch are reported before it is loaded; torchrun's processes check one after another.
    source = None if is_distributed else preflight(cfg)
    terminal = cli.Terminal(quiet=is_distributed and os.environ.get("RANK", "0") != "0")
    from kmine.loop.advice import next_step
    from kmine.loop.engine import run_rounds
    from kmine.loop.folds import refuse_other_folder, run_folds
    from kmine.plan.engine import planned_config
    from kmine.report.comparison import summary_lines
    from kmine.report.table import RoundsTable
    from kmine.setup.finished import ALL_MASKS
    from kmine.training.rounds import kept_round

    refuse_other_folder(cfg)
    try:
        plan = None
        if cfg.plan and given is not None:
            cfg, plan = planned_config(cfg, given, source, terminal.log)
            source = source if source is None or DATASETS.is_builtin(cfg.data.name) else preflight(cfg)
        results = (run_folds if cfg.data.num_runs > 1 else run_rounds)(cfg, terminal, source, plan)
        compared = _compared(cfg, terminal) if results and cfg.data.num_runs > 1 else None
    finally:
        terminal.stop()
    if results is None:
        return 0
    terminal.console.print(RoundsTable(results.rows, results.segmenter))
    last = [result.round_idx for result in results.mined if not result.retrained][-1]
    terminal.log(f"stopped after round {last} of {cfg.rounds}: {STOPPED_BY[results.stopped_by]}")
    if results.baselines:
        scores = [f"{name} {kept_round(rounds).metrics.dice:.3f}" for name, rounds in results.baselines.items()]
        terminal.log(f"baselines on validation, the better one first: {', '.join(scores)}")
    outcome, root = results.outcome, Path(cfg.out)
    if compared:
        terminal.log(f"Dice over all folds, of every image by models not trained on it ({root / 'test_table.md'}):")
        for line in summary_lines(compared):
            terminal.log(line)
        outcome = outcome and replace(outcome, gain=_mining_gain(compared))
    if outcome and (advice := next_step(outcome)):
        terminal.log(advice)
    final = root / ALL_MASKS if compared else root
    terminal.log(f"results: {final / 'results.csv'}   report: {final / 'report.html'}")
    _log_end(results, began, terminal)
    return 0


def _log_end(results: LoopResults, began: float, terminal: cli.Terminal) -> None:
    """Time of this session, of the stages of all rounds of mining, and what to type next."""
    stages = sum((Counter(result.seconds) for result in results.mined), Counter())
    of_each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.most_common() if seconds >= 1)
    terminal.log(f"time: {duration(time.perf_counter() - began)}; rounds of mining: {of_each or 'below a second'}")
    width = max((len(command) for command, _ in results.commands), default=0)
    for command, meaning in results.commands:
        terminal.log(f"next: {command:<{width}}  {meaning}")


def _compared(cfg: LoopConfig, terminal: cli.Terminal) -> Comparison:
    """Table of the folds on their test splits, which are opened now that all runs are done; written into `cfg.out`."""
    from kmine.compare.__main__ import CompareConfig, compare_and_write

    return compare_and_write(CompareConfig(runs=[cfg.out], device=cfg.device), terminal).table


def _mining_gain(table: Comparison) -> Paired | None:
    """The difference of mining to the baseline."""
    rows = [row for row in table.rows if row.method.startswith(MINING) and math.isfinite(row.difference)]
    return Paired(rows[0].difference, rows[0].low, rows[0].high, rows[0].num_pairs) if rows else None


if __name__ == "__main__":
    sys.exit(main())
