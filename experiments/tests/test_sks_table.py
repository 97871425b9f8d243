"""The tables of experiments/sks follow from the figures of every image beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "sks"
spec = importlib.util.spec_from_file_location("sks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def test_every_row_of_the_tables_follows_from_the_figures_of_every_image():
    made = [line for line in run.table(FOLDER / "results.csv").splitlines() if line.startswith("| ")]
    written = (FOLDER / "README.md").read_text("utf-8").splitlines()
    assert len(made) > 10 and [line for line in made if line not in written] == []
