"""`python -m kmine.plan`: the command line of `kmine.plan.engine`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kmine import cli
from kmine.config import MAIN_SETTINGS, LoopConfig
from kmine.io.console import say
from kmine.io.files import write_atomic
from kmine.io.presets import SUFFIXES
from kmine.setup.preflight import preflight

if TYPE_CHECKING:
    from kmine.plan.engine import RunPlan

DESCRIPTION = """Choose image size, network, batch, steps, rounds, workers and precision from the data, this machine and
a time budget (--plan_minutes), and print them with reasons, time by stage, and memory. Takes the settings of
kmine.loop; those given stay. kmine.loop does the same before it trains. --out FILE.yaml writes the settings for
`kmine loop --config FILE.yaml`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine plan"
    words = sys.argv[1:] if argv is None else argv
    cfg = cli.parse(LoopConfig, words, prog=prog, description=DESCRIPTION, main=MAIN_SETTINGS)
    given = frozenset(cli.GIVEN)
    return cli.guarded(prog, lambda: int(show_plan(cfg, given) is None))


def show_plan(cfg: LoopConfig, given: Collection[str]) -> RunPlan:
    """Make a plan and print it; its settings are written if `cfg.out` is a YAML file."""
    source = preflight(cfg)
    from kmine.plan.engine import plan_run

    plan = plan_run(cfg, given, source)
    say("".join(f"{line}\n" for line in plan.lines()))
    out = Path(cfg.out)
    if out.suffix not in SUFFIXES:
        say("to train so: kmine loop with the same settings; to write them: --out FILE.yaml\n")
        return plan
    names = {choice.setting for choice in plan.choices} | {*given}
    nested = {**_some(cli.to_dict(plan.cfg), names), "out": f"runs/{out.stem}"}
    minutes = f"# By kmine plan, for about {plan.estimate.total / 60:.0f} minutes on {plan.machine.device}.\n"
    write_atomic(out, (f"# kmine loop --config {out}\n{minutes}" + yaml.safe_dump(nested, sort_keys=False)).encode())
    say(f"to train so: kmine loop --config {out}\n")
    return plan


def _some(values: Mapping[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The settings `names`, dotted, of nested values."""
    sections = {k: _some(v, names, f"{prefix}{k}.") if isinstance(v, Mapping) else v for k, v in values.items()}
    return {k: v for k, v in sections.items() if f"{prefix}{k}" in names or (v and isinstance(v, dict))}


if __name__ == "__main__":
    sys.exit(main())
