"""`python -m kmine.loop`: the command line of `kmine.loop.engine`."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from kmine import cli
from kmine.config import LoopConfig
from kmine.data import DATASETS
from kmine.setup.preflight import preflight
from kmine.types import STOPPED_BY

DESCRIPTION = """Train a local model on the few masks, mine pseudo masks with a promptable segmenter on the unlabeled
images, retrain, and repeat. Without settings: procedural phantom images, minutes on two CPU cores, no download.
The same command again resumes where it stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine loop"
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    given = frozenset(cli.GIVEN)
    return cli.guarded(prog, lambda: run_loop(cfg, given))


def run_loop(cfg: LoopConfig, given: Collection[str] | None = None) -> int:
    """Run or resume the loop of `cfg` and print its results; in a distributed launch only the first process prints.

    With the names of the settings that were `given`, `kmine.plan` chooses others.
    """
    is_distributed = "TORCHELASTIC_RUN_ID" in os.environ  # set by torchrun
    # Errors that need no torch are reported before it is loaded; torchrun's processes check one after another.
    source = None if is_distributed else preflight(cfg)
    terminal = cli.Terminal(quiet=is_distributed and os.environ.get("RANK", "0") != "0")
    from kmine.loop.engine import run_rounds
    from kmine.plan.engine import planned_config
    from kmine.report.table import RoundsTable

    try:
        plan = None
        if cfg.plan and given is not None:
            cfg, plan = planned_config(cfg, given, source, terminal.log)
            source = source if source is None or DATASETS.is_builtin(cfg.data.name) else preflight(cfg)
        results = run_rounds(cfg, terminal, source, plan)
    finally:
        terminal.stop()
    if results is None:
        return 0
    terminal.console.print(RoundsTable(results.rows, results.segmenter))
    terminal.log(f"stopped after round {results.mined[-1].round_idx} of {cfg.rounds}: {STOPPED_BY[results.stopped_by]}")
    if results.advice:
        terminal.log(f"no mask was kept: {results.advice}")
    terminal.log(f"results: {Path(cfg.out) / 'results.csv'}   report: {Path(cfg.out) / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
