"""`python -m kmine.sweep`: a run folder per method, model, label fraction and seed; one table, sweep.csv."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kmine import cli
from kmine.config.sweep import MINING, SweepConfig
from kmine.segmenters import fetch_weights
from kmine.sweep.plan import claim, describe, make_plan, write_table
from kmine.sweep.trials import Session, Trial, config_of
from kmine.sweep.workers import work, work_in_processes

DESCRIPTION = """Train every method with every model, label fraction and seed at equal optimizer steps, each into a run
folder of its own, and keep one table, sweep.csv, which kmine.compare evaluates on the test split. The same command
again resumes and retries failed trials; started twice, it shares the work. Every setting of kmine.loop is also a
setting of the sweep. Exit code 1: some trials failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine sweep"
    cfg = cli.parse(SweepConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    return cli.guarded(prog, lambda: run_sweep(cfg))


def run_sweep(cfg: SweepConfig) -> int:
    """Run or resume the sweep of `cfg`; returns 1 if a trial failed, else 0."""
    terminal, since = cli.Terminal(), time.time()
    plan, source = make_plan(cfg)
    session = Session(cfg, plan.trials, plan.trials, since)
    if not cfg.dry_run:
        _fetch_weights(cfg, plan.trials)
        session = replace(session, table_trials=claim(cfg, plan, source))
        write_table(cfg.out, session.table_trials)
    for line in describe(plan, session.states(), since, cfg.processes):
        terminal.log(line)
    if cfg.dry_run:
        return 0
    try:
        if cfg.backend == "ray":
            from kmine.sweep.ray_backend import work_on_ray

            work_on_ray(session, terminal)
        elif cfg.processes > 1:
            work_in_processes(session, terminal)
        else:
            work(session, source, terminal)
    finally:
        terminal.stop()
        write_table(cfg.out, session.table_trials)
    return _summarize(session, terminal)


def _fetch_weights(cfg: SweepConfig, trials: Sequence[Trial]) -> None:
    """Download weights before the first trial; parallel trials would download one file at the same time."""
    if cfg.backend == "ray":  # its nodes have their own weights
        return
    for trial in {trial.model: trial for trial in trials if trial.method == MINING}.values():
        loop = config_of(cfg, trial)
        if loop.rounds:
            fetch_weights(loop.segmenter, offline=loop.offline)


def _summarize(session: Session, terminal: cli.Terminal) -> int:
    states, out = session.states(), session.cfg.out
    failed = {trial: state for trial, state in states.items() if state.get("status") == "failed"}
    for trial, state in failed.items():
        terminal.log(f"failed: {trial}: {state['error']}")
    terminal.log(f"{len(states) - len(failed)} of {len(states)} trials done; table: {Path(out) / 'sweep.csv'}")
    if failed:
        terminal.log("the same command retries the failed trials")
    terminal.log(f"on the test split: python -m kmine.compare {out}")
    assert not replace(session, since=0).remaining(), "every trial is finished when the workers end"
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
