"""`python -m kmine.loop`: the loop from a few masks to a local model and traced pseudo masks."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmine import cli
from kmine.config import LoopConfig
from kmine.records import STOPPED_BY, stopped_by
from kmine.store import RunStore

if TYPE_CHECKING:
    from kmine.methods import Task
    from kmine.records import RoundResult
    from kmine.report import RoundRow

DESCRIPTION = """Train a local model on the few masks, mine pseudo masks from a promptable segmenter on the unlabeled
images, retrain, and go round again. Without settings: procedural phantom images, minutes on two CPU cores, no download.
The same command again resumes where it stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog = "kmine loop"
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    return cli.guarded(prog, lambda: run_loop(cfg))


def run_loop(cfg: LoopConfig) -> int:
    """Run the loop that `cfg` describes, or go on with it, and leave a run folder."""
    from kmine.preflight import preflight

    source = preflight(cfg)
    store = RunStore(Path(cfg.out))
    store.claim(cli.to_dict(cfg), source.fingerprint())
    terminal, began = cli.Terminal(), time.perf_counter()
    from kmine.runs import open_task, peak_memory_mb, provenance  # seconds of imports: only once the run may begin

    try:
        task = open_task(cfg, source, store, terminal)
        store.update_run(**provenance(cfg, task, source), stopped_by="interrupted")
        terminal.say(
            f"{source.name}: {len(task.labeled)} labeled, {len(task.unlabeled)} unlabeled, {len(task.val)} validation "
            f"images; segmenter {task.segmenter.name if task.segmenter else 'none'}; run folder {cfg.out}"
        )
        task = _prepared(task, store)
        mined, supervised = _rounds(task, store)
        store.update_run(
            stopped_by=stopped_by(mined, cfg.rounds),
            adopted_round=max(r.round_idx for r in mined if r.adopted),
            peak_memory_mb=peak_memory_mb(),
            seconds_of_last_session=round(time.perf_counter() - began, 1),
        )
        rows = _publish(task, store, mined, supervised, with_report=True)
    finally:
        terminal.stop()
        store.close()
    from kmine.report import render_table

    terminal.console.print(render_table(rows, task.segmenter.name if task.segmenter else "none"))
    terminal.say(
        f"stopped after round {mined[-1].round_idx} of {cfg.rounds}: {STOPPED_BY[stopped_by(mined, cfg.rounds)]}"
    )
    terminal.say(f"results: {store.root / 'results.csv'}   report: {store.root / 'report.html'}")
    return 0


def _prepared(task: Task, store: RunStore) -> Task:
    """The task with its segmenter adapted to the labels, where that helps, and the gate calibrated on them.

    run.json then names what really mines.
    """
    from kmine.preparation.adaptation import adapt_segmenter
    from kmine.preparation.calibration import calibrate

    base = task.segmenter
    task = calibrate(adapt_segmenter(task, store), base, store)
    if task.segmenter:
        store.update_run(segmenter=task.segmenter.name, segmenter_sha256=task.segmenter.signature)
    return task


def _rounds(task: Task, store: RunStore) -> tuple[list[RoundResult], list[RoundResult]]:
    """All rounds of the loop, then of the baseline; results.csv is rewritten after each."""
    from kmine.methods.mining import mine
    from kmine.methods.supervised import supervised

    mined: list[RoundResult] = []
    for result in mine(task, store):
        mined.append(result)
        _publish(task, store, mined, [])
    trained = mined[-1].round_idx - mined[-1].found_nothing
    if not (task.cfg.baseline and trained):
        return mined, []
    as_long = replace(task, cfg=replace(task.cfg, rounds=trained))
    return mined, list(supervised(as_long, store))


def _publish(
    task: Task,
    store: RunStore,
    mined: list[RoundResult],
    supervised: list[RoundResult],
    *,
    with_report: bool = False,
) -> list[RoundRow]:
    from kmine.summary import build_report, round_rows, write_results

    rows = round_rows(task, store, mined, supervised)
    write_results(store, rows, task.segmenter.name if task.segmenter else "none")
    if with_report:
        from kmine.report import write_report

        config_yaml = (store.root / "config.yaml").read_text()
        write_report(store.root / "report.html", build_report(task, store, rows, config_yaml))
    return rows


if __name__ == "__main__":
    sys.exit(main())
