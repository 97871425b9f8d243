"""Fixtures of the methods' tests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kmine.config import LoopConfig
from kmine.data import open_source
from kmine.runs import open_task
from kmine.store import RunStore

from .small import Silent


@pytest.fixture
def task_of(tmp_path):
    def build(cfg: LoopConfig, name: str = "run", segmenter=None):
        cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(tmp_path / "cache")))
        store = RunStore(tmp_path / name)
        task = open_task(cfg, open_source(cfg.data), store, Silent())
        return (replace(task, segmenter=segmenter) if segmenter else task), store

    return build
