"""Plans that measure nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.plan_facts import CPU, SPEED, TINY

from kmine.plan import engine


@pytest.fixture
def measured(monkeypatch):
    """Plans of a machine that trains 10 steps a second at 96 px; the list of the sizes that were probed."""
    probed = []

    def measure_network(cfg, source, ids):
        probed.append(cfg.data.size)
        return replace(SPEED.at(cfg.data.size), batch_size=cfg.fit.batch_size)

    monkeypatch.setattr(engine, "measure_network", measure_network)
    monkeypatch.setattr(engine, "measure_segmenter", lambda *_: TINY)
    monkeypatch.setattr(engine, "this_machine", lambda _: CPU)
    return probed
