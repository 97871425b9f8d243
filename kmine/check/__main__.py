"""`python -m kmine.check`: what would spoil a result in a data set, before anything is trained on it.

Opens every image and every mask, those of the test split included; nothing that is trained or chosen uses the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kmine import cli
from kmine.config import DATA_SETTINGS, LoopConfig
from kmine.data.source import Source
from kmine.io.console import say
from kmine.io.files import write_atomic, write_json

DESCRIPTION = """Examine a data set: counts, sizes, masks, duplicates, leaks between splits, and whether masks belong to
their images. Writes check.json and check.png (samples with their masks) into the folder --out. Takes the settings of
kmine.loop; those of training are ignored. Exit code 1 if something would spoil a result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine check"
    words = sys.argv[1:] if argv is None else argv
    cfg = cli.parse(LoopConfig, words, prog=prog, description=DESCRIPTION, main=DATA_SETTINGS)
    return cli.guarded(prog, lambda: run_check(cfg))


def run_check(cfg: LoopConfig, source: Source | None = None) -> int:
    """Examine the data of `cfg` (`source`, if open), print and write the result; returns 1 if there is a fault."""
    from kmine.check.findings import examine_source, open_despite_damage
    from kmine.check.report import contact_sheet_png, render_text, report_values

    source, refusals = open_despite_damage(cfg.data) if source is None else (source, [])
    out, terminal = Path(cfg.out), cli.Terminal()
    try:
        checked = examine_source(cfg.data, cfg.seed, source, refusals, terminal)
        report = report_values(cfg.data, source, checked)
        write_json(out / "check.json", report)
        write_atomic(out / "check.png", contact_sheet_png(source, checked))
    finally:
        terminal.stop()
    say(render_text(report, out))
    return int(checked.has_fault)


if __name__ == "__main__":
    sys.exit(main())
