"""Settings shared by the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kmine.config import LoopConfig
    from kmine.segmenters.base import Segmenter

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
    from helpers.small import build_task

    def build(cfg: LoopConfig, name: str = "run", segmenter: Segmenter | None = None):
        return build_task(tmp_path, cfg, name, segmenter)

    return build


@pytest.fixture
def copy_of(tmp_path):
    """Copies (task, run folder) that several tests share, for one that changes the folder."""
    from helpers.small import copy_task

    return lambda shared: copy_task(*shared, tmp_path / "copy")
