"""The tables of the experiments' READMEs follow from the figures of every image beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1]

NAMES = ("sks", "next_labels", "recipe", "pseudo_label_audit", "mining_engine", "new_source")
PARTS = ("images.csv", "objects.csv")
"""Read beside results.csv."""
FIGURES = sorted(path for name in NAMES for path in (EXPERIMENTS / name).glob("*.csv") if path.name not in PARTS)


@pytest.mark.parametrize("figures", FIGURES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_row_of_the_tables_follows_from_the_figures_of_every_image(figures):
    own = figures.with_name(f"{figures.stem.split('_')[0]}.py")  # of parts_1cb674f.csv as of parts.csv
    script = own if own.exists() else figures.with_name("run.py")
    spec = importlib.util.spec_from_file_location(f"{figures.parent.name}_{script.stem}", script)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    made = [line for line in run.table(figures).splitlines() if line.startswith("| ")]
    written = figures.with_name("README.md").read_text("utf-8").splitlines()
    assert len(made) > 3 and [line for line in made if line not in written] == []
