"""`python -m kmine.plan`: the command line of `kmine.plan.engine`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from kmine import cli
from kmine.config import LoopConfig
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
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
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
    planned = {choice.setting for choice in plan.choices}
    values = {name: value for name, value in cli.flat(cli.to_dict(plan.cfg)).items() if name in {*planned, *given}}
    nested = _nested({**values, "out": f"runs/{out.stem}"})
    minutes = f"# By kmine plan, for about {plan.estimate.total / 60:.0f} minutes on {plan.machine.device}.\n"
    write_atomic(out, (f"# kmine loop --config {out}\n{minutes}" + yaml.safe_dump(nested, sort_keys=False)).encode())
    say(f"to train so: kmine loop --config {out}\n")
    return plan


def _nested(values: dict[str, object]) -> dict[str, object]:
    """Sections of dotted names."""
    out: dict[str, object] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        here = out
        for section in sections:
            here = here.setdefault(section, {})  # type: ignore[assignment]
        here[field] = value
    return out


if __name__ == "__main__":
    sys.exit(main())
