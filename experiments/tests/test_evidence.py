"""The figure of docs/evidence.md shows what follows from the figures of every image."""

from __future__ import annotations

import html
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parents[1]


def test_every_difference_of_the_figure_follows_from_the_figures_of_every_image(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXPERIMENTS)])
    import evidence

    drawn = html.unescape((EXPERIMENTS.parent / "docs/evidence.svg").read_text("utf-8"))
    found = list(evidence.rows())
    assert len(found) >= 9 and [row.text for row in found if row.text not in drawn] == []
