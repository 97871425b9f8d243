"""`kmine sweep` on a phantom small enough for a test, and its table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from helpers.loop_command import (
    FEW_STEPS,
    OPEN_GATE,
    SMALL,
    words,
)

from kmine import cli
from kmine.config.sweep import SweepConfig
from kmine.sweep import __main__ as sweep

TINY = {**SMALL, **OPEN_GATE, **FEW_STEPS}
MEASURED = ("seconds", "peak_memory_mb")
"""Columns in which two sweeps of the same cells differ."""


def sweep_words(out: Path, cache: Path, *more: str, **changes: object) -> list[str]:
    return [*words(TINY, out, cache, **changes), *more]


def run_sweep(out: Path, cache: Path, *more: str, **changes: object) -> int:
    return sweep.main(sweep_words(out, cache, *more, **changes))


def settings(out: Path, cache: Path, *more: str, **changes: object) -> SweepConfig:
    return cli.parse(SweepConfig, sweep_words(out, cache, *more, **changes), prog="kmine sweep", description="words")


def table(folder: Path, without: Sequence[str] = ()) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]
