"""`python -m kmine.sweep`: a run folder per method, model, label fraction and seed; one table, sweep.csv."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.config.sweep import MINING, SWEEP_SETTINGS, SweepConfig
from kmine.io.files import write_json
from kmine.segmenters import fetch_weights
from kmine.setup.preflight import preflight
from kmine.sweep.plan import claim, describe, make_plan, write_table
from kmine.sweep.trials import Session, Trial, config_of, data_of
from kmine.sweep.workers import auto_processes, work, work_in_processes

NETWORK = ("model.encoder", "model.encoder_depth", "model.decoder_width")
DESCRIPTION = """Train every method with every model, label fraction and seed at equal optimizer steps, each into a run
folder of its own, and keep one table, sweep.csv, which kmine.compare evaluates on the test split. The same command
again resumes and retries failed trials; started twice, it shares the work. Every setting of kmine.loop is also a
setting of the sweep. Exit code 1: some trials failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine sweep"
    words = sys.argv[1:] if argv is None else argv
    cfg = cli.parse(SweepConfig, words, prog=prog, description=DESCRIPTION, main=SWEEP_SETTINGS)
    given = frozenset(cli.GIVEN)
    return cli.guarded(prog, lambda: run_sweep(cfg, given))


def run_sweep(cfg: SweepConfig, given: Collection[str] | None = None) -> int:
    """Run or resume the sweep of `cfg`; returns 1 if a trial failed, else 0.

    With the names of the settings that were `given`, `kmine.plan` chooses others, once for all trials.
    """
    terminal, since, record = cli.Terminal(), time.time(), None
    if cfg.processes == "auto":
        from kmine.plan.machine import this_machine

        cfg = replace(cfg, processes=auto_processes(this_machine(cfg.device), cfg.device))
    if cfg.plan and given is not None:
        cfg, record = _planned(cfg, given, terminal)
    plan, source = make_plan(cfg)
    session = Session(cfg, plan.trials, plan.trials, since)
    if not cfg.dry_run:
        _fetch_weights(cfg, plan.trials)
        session = replace(session, table_trials=claim(cfg, plan, source))
        if record is not None:
            write_json(Path(cfg.out) / "plan.json", record)
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


def _planned(
    cfg: SweepConfig, given: Collection[str], terminal: cli.Terminal
) -> tuple[SweepConfig, dict[str, Any] | None]:
    """The sweep with settings planned for its smallest share of labels; several models keep their own encoders."""
    from kmine.plan.engine import planned_config

    fixed = {"data.label_fraction", *(NETWORK if len(cfg.models) > 1 else ())}
    trial = replace(cfg, data=data_of(cfg, min(cfg.fractions)), model=replace(cfg.model, name=cfg.models[0]))
    planned, record = planned_config(trial, {*given, *fixed}, preflight(trial), terminal.log)
    same = {name: getattr(cfg.data, name) for name in ("label_fraction", "fine_groups")}
    model = replace(planned.model, name=cfg.model.name)
    return replace(planned, data=replace(planned.data, **same), model=model), record


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
