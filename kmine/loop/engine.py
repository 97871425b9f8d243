"""The loop in a run folder: settings in; rounds, tables and the report out. Needs no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kmine.config import LoopConfig
from kmine.data.source import Source
from kmine.io.files import write_json
from kmine.io.log_file import LOG_FILE, logged
from kmine.loop.advice import Outcome, next_commands, next_step, outcome_of
from kmine.loop.summary import build_report, gain_over, round_rows, segmenter_name, write_results
from kmine.methods.mining import prepare_and_mine
from kmine.methods.supervised import labels_only, supervised, supervised_once
from kmine.report.html import write_report
from kmine.report.inputs import RoundRow
from kmine.report.training_curves import CURVES, curves_picture
from kmine.setup.open import begin_run, open_fabric
from kmine.setup.preflight import preflight
from kmine.setup.provenance import peak_memory_mb, preparing
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import rank_zero_first
from kmine.training.rounds import kept_round
from kmine.training.task import Task
from kmine.types import ProgressReporter, RoundResult, labels_only_dir, stopped_by


@dataclass(frozen=True)
class LoopResults:
    """Results of a finished run."""

    mined: list[RoundResult]
    """Rounds of mining, round 0 first."""
    baselines: dict[str, list[RoundResult]]
    """Results of the supervised baselines at equal optimizer steps by method, the better one first; may be empty."""
    rows: list[RoundRow]
    """Rows of results.csv."""
    segmenter: str
    stopped_by: str
    """Key of `kmine.types.STOPPED_BY`."""
    outcome: Outcome | None = None
    """What the run shows, for `next_step`; None without mining or without a baseline."""
    by_model: dict[str, list[RoundResult]] = field(default_factory=dict)
    """Rounds of each of `baseline_models`, trained on the labels alone."""
    commands: Sequence[tuple[str, str]] = ()
    """What to type next, and what for."""


def run_rounds(
    cfg: LoopConfig, progress: ProgressReporter, source: Source | None = None, plan: Mapping[str, Any] | None = None
) -> LoopResults | None:
    """Run all rounds that `cfg` describes into the run folder `cfg.out`, or resume them.

    In a distributed launch only the first process writes files of the run as a whole. It opens the data, adapts the
    segmenter and calibrates the gate before the others, which read the results.

    `source` is the data set of `cfg.data`, if it is open already. `plan`, of a run without trainings, is written to
    plan.json. Returns None in all processes but the first.

    Raises:
        UserError: settings or data that cannot work, or a run folder of other settings or data.
    """
    began, fabric = time.perf_counter(), open_fabric(cfg)
    with rank_zero_first(fabric):
        source = source or preflight(cfg)
    with ExitStack() as stack:
        run = stack.enter_context(closing(RunFolder(Path(cfg.out), follows=fabric.global_rank > 0)))
        if not run.follows:
            progress = stack.enter_context(logged(run.root / LOG_FILE, progress))
        if plan is not None:
            write_json(run.root / "plan.json", plan)
        with rank_zero_first(fabric):
            task = begin_run(cfg, source, run, progress, fabric)
        progress.log(
            f"{source.name}: {len(task.labeled)} labeled, {len(task.unlabeled)} unlabeled, {len(task.val)} validation "
            f"images; segmenter {segmenter_name(run)}; run folder {cfg.out}"
        )
        mined = list(_published(task))
        baselines, by_model = _baselines(task, mined)
        if run.follows:
            return None
        reason = stopped_by(mined, cfg.rounds)
        kept = {labels_only_dir(name): kept_round(results).round_idx for name, results in by_model.items()}
        kept |= {name: kept_round(results).round_idx for name, results in baselines.items()}
        run.update_run(
            stopped_by=reason,
            adopted_round=kept_round(mined).round_idx,
            kept_rounds=run.run().get("kept_rounds", {}) | kept,
            peak_memory_mb=peak_memory_mb(),
            seconds_of_last_session=round(time.perf_counter() - began, 1),
        )
        rows = round_rows(task, mined, baselines, by_model)
        write_results(run, rows)
        decisions, kept_none = run.decisions(_last_mined(mined).round_idx), reason == "no_pseudo_masks"
        is_compared = bool(cfg.rounds) and (cfg.baseline or kept_none)
        gain = gain_over(task, mined, next(iter(baselines.values()), ()))
        outcome = outcome_of(task, source, decisions, gain, kept_none=kept_none) if is_compared else None
        advice, commands = next_step(outcome) if outcome else "", next_commands(run)
        report = build_report(task, rows, mined, baselines, by_model)
        write_report(run.root / "report.html", replace(report, advice=advice, commands=commands))
        run.write_text(CURVES, curves_picture(report.history, [row.round_idx for row in rows if row.retrained]))
        return LoopResults(mined, baselines, rows, segmenter_name(run), reason, outcome, by_model, commands)


def _last_mined(results: Sequence[RoundResult]) -> RoundResult:
    return [result for result in results if not result.retrained][-1]


def _baselines(
    task: Task, mined: list[RoundResult]
) -> tuple[dict[str, list[RoundResult]], dict[str, list[RoundResult]]]:
    """Results of the supervised baselines by method, the better one on validation first, and of the baseline models.

    They have as many steps as the rounds of mining that were trained.
    """
    last = _last_mined(mined)
    num_trained = last.round_idx - last.has_no_pseudo_masks
    task = replace(task, cfg=replace(task.cfg, rounds=num_trained))
    if not task.cfg.baseline:
        return {}, {}
    methods = {"supervised": supervised, "supervised_once": supervised_once} if num_trained else {}
    results = {name: list(method(task)) for name, method in methods.items()}
    by_model = {name: list(labels_only(task, name)) for name in task.cfg.baseline_models}
    return dict(sorted(results.items(), key=lambda item: -kept_round(item[1]).metrics.score)), by_model


def _published(task: Task) -> Iterator[RoundResult]:
    """Rounds of mining; results.csv is rewritten after each."""
    with preparing(task.run):  # adaptation and calibration end before the first round is requested
        rounds = prepare_and_mine(task)
    mined: list[RoundResult] = []
    for result in rounds:
        mined.append(result)
        if not task.run.follows:
            write_results(task.run, round_rows(task, mined))
        yield result
