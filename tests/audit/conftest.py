"""A finished run of two rounds with its audit, trained once for all tests of this folder."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.loop_command import OPEN_GATE, SMALL, adopt_all, run_loop

from kmine.audit import __main__ as audit

TINY = {
    **SMALL,
    **OPEN_GATE,
    "gate.mode": "ranked",
    "data.num_samples": 40,
    "data.label_fraction": 0.4,
    "fit.steps": 8,
    "fit.round_steps": 4,
    "fit.val_every": 4,
    "adapt.folds": 2,
    "adopt_tolerance": 1,
    "rounds": 2,
    "refine.ask_local": "false",
}


@pytest.fixture(scope="session")
def audited_run(tmp_path_factory) -> Path:
    """The run folder, with fold models; not to be changed."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    with pytest.MonkeyPatch.context() as patch:
        adopt_all(patch)
        assert run_loop(TINY, folder) == 0
    assert audit.main([str(folder), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(audited_run, tmp_path) -> Path:
    """A copy of the run folder, to be changed."""
    return Path(shutil.copytree(audited_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, str]]]:
    """Reads the audit.csv of a folder."""

    def read(folder: Path) -> list[dict[str, str]]:
        with (folder / "audit.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return read
