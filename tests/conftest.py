"""Settings shared by the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kmine.config import LoopConfig

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test depends on what lies in the caches of the user.
_CACHES = tempfile.mkdtemp(prefix="kmine-tests-")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
os.environ |= {name: f"{_CACHES}/{name}" for name in ("KMINE_CACHE", "HF_HOME", "TORCH_HOME")}
os.environ["HF_HUB_CACHE"] = f"{_CACHES}/HF_HOME/hub"


@pytest.fixture
def task_of(tmp_path):
    """Builds (task, run folder) from a config, with a cache in the test's own folder."""
    from helpers.small import Silent

    from kmine.data import open_source
    from kmine.setup.open import open_task
    from kmine.store.run_folder import RunFolder

    def build(cfg: LoopConfig, name: str = "run", segmenter=None):
        cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(tmp_path / "cache")))
        store = RunFolder(tmp_path / name)
        task = open_task(cfg, open_source(cfg.data), store, Silent())
        return (replace(task, segmenter=segmenter) if segmenter else task), store

    return build
