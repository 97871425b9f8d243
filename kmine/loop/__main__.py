"""`python -m kmine.loop`: the loop from a few masks to a local model and traced pseudo masks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine import cli
from kmine.config import LoopConfig
from kmine.store.run_folder import RunFolder
from kmine.types import STOPPED_BY, stopped_by

if TYPE_CHECKING:
    from kmine.data.source import Source
    from kmine.report import RoundRow
    from kmine.training.task import Task
    from kmine.types import RoundResult

DESCRIPTION = """Train a local model on the few masks, mine pseudo masks from a promptable segmenter on the unlabeled
images, retrain, and go round again. Without settings: procedural phantom images, minutes on two CPU cores, no download.
The same command again resumes where it stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog = "kmine loop"
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    return cli.guarded(prog, lambda: run_loop(cfg))


def run_loop(cfg: LoopConfig) -> int:
    """Run the loop that `cfg` describes, or go on with it, and leave a run folder.

    Of several processes that `torchrun` or `fabric run` started, the first leads: it alone speaks and writes, and does
    alone what they do not share (opening the data, adapting the segmenter, calibrating the gate).
    """
    from kmine.setup.preflight import preflight

    fabric = _distributed_fabric(cfg)
    follows = fabric is not None and not fabric.is_global_zero
    terminal, began = cli.Terminal(quiet=follows), time.perf_counter()
    with _rank_zero_first(fabric):
        source = preflight(cfg)
        store = RunFolder(Path(cfg.out), follows=follows)
        if not follows:
            store.claim(
                cli.to_dict(cfg), source.fingerprint(), lambda: _content_fingerprints(cfg, source, store, terminal)
            )
        from kmine.setup.open import open_task
        from kmine.setup.provenance import peak_memory_mb, provenance

        try:
            task = open_task(cfg, source, store, terminal, fabric)
            store.update_run(**provenance(cfg, task, source), stopped_by="interrupted")
        except BaseException:
            terminal.stop()
            store.close()
            raise
    try:
        terminal.log(
            f"{source.name}: {len(task.labeled)} labeled, {len(task.unlabeled)} unlabeled, {len(task.val)} validation "
            f"images; segmenter {task.segmenter.name if task.segmenter else 'none'}; run folder {cfg.out}"
        )
        task = _adapt_and_calibrate(task)
        mined, supervised = _rounds(task)
        if follows:
            return 0
        store.update_run(
            stopped_by=stopped_by(mined, cfg.rounds),
            adopted_round=max(r.round_idx for r in mined if r.adopted),
            peak_memory_mb=peak_memory_mb(),
            seconds_of_last_session=round(time.perf_counter() - began, 1),
        )
        rows = _publish(task, mined, supervised, with_report=True)
    finally:
        terminal.stop()
        store.close()
    from kmine.report import render_table

    terminal.console.print(render_table(rows, task.segmenter.name if task.segmenter else "none"))
    terminal.log(
        f"stopped after round {mined[-1].round_idx} of {cfg.rounds}: {STOPPED_BY[stopped_by(mined, cfg.rounds)]}"
    )
    terminal.log(f"results: {store.root / 'results.csv'}   report: {store.root / 'report.html'}")
    return 0


def _content_fingerprints(cfg: LoopConfig, source: Source, store: RunFolder, terminal: cli.Terminal) -> dict[str, str]:
    from kmine.setup.open import content_fingerprints

    terminal.log("the data's files are not of the time they had when this run began: comparing what they hold")
    return content_fingerprints(cfg, source, store)


def _distributed_fabric(cfg: LoopConfig) -> Any:
    """Fabric of the processes that share this run; None where there is but one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # what torchrun sets; asked here, for torch is not loaded yet
        return None
    from kmine.setup.open import open_fabric

    fabric = open_fabric(cfg)
    return fabric if fabric.world_size > 1 else None


def _rank_zero_first(fabric: Any) -> AbstractContextManager[None]:
    if fabric is None:
        return nullcontext()
    from kmine.training.distributed import rank_zero_first

    return rank_zero_first(fabric)


def _adapt_and_calibrate(task: Task) -> Task:
    """The task with its segmenter adapted to the labels, where that helps, and the gate calibrated on them.

    run.json then names what really mines.
    """
    from kmine.mining.adaptation.step import adapt_segmenter
    from kmine.mining.calibration.step import calibrate
    from kmine.setup.provenance import preparing
    from kmine.training.model_setup import new_model
    from kmine.training.task import single_process
    from kmine.training.trainer import train

    fabric, base = task.fabric, task.segmenter
    if fabric.world_size > 1:
        train(task, new_model(task), round_idx=0)  # together; below, one process finds it done
    with _rank_zero_first(fabric), preparing(task.run):
        task = replace(calibrate(adapt_segmenter(single_process(task)), base), fabric=fabric)
    if task.segmenter:
        task.run.update_run(segmenter=task.segmenter.name, segmenter_sha256=task.segmenter.signature)
    return task


def _rounds(task: Task) -> tuple[list[RoundResult], list[RoundResult]]:
    """All rounds of the loop, then of the baseline; results.csv is rewritten after each."""
    from kmine.methods.mining import mine
    from kmine.methods.supervised import supervised

    mined: list[RoundResult] = []
    for result in mine(task):
        mined.append(result)
        if not task.run.follows:
            _publish(task, mined, [])
    num_trained = mined[-1].round_idx - mined[-1].has_no_pseudo_masks
    if not (task.cfg.baseline and num_trained):
        return mined, []
    baseline_task = replace(task, cfg=replace(task.cfg, rounds=num_trained))
    return mined, list(supervised(baseline_task))


def _publish(
    task: Task,
    mined: list[RoundResult],
    supervised: list[RoundResult],
    *,
    with_report: bool = False,
) -> list[RoundRow]:
    from kmine.loop.summary import build_report, round_rows, write_results

    rows = round_rows(task, mined, supervised)
    write_results(task.run, rows, task.segmenter.name if task.segmenter else "none")
    if with_report:
        from kmine.report import write_report

        config_yaml = (task.run.root / "config.yaml").read_text()
        write_report(task.run.root / "report.html", build_report(task, rows, config_yaml))
    return rows


if __name__ == "__main__":
    sys.exit(main())
