"""One calibration for all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def calibrated_once(tmp_path_factory):
    from helpers.calibration import FLIPPED
    from helpers.small import build_task

    from kmine.mining.calibration.step import calibrate
    from kmine.segmenters.ellipse import Ellipse

    task, store = build_task(tmp_path_factory.mktemp("calibrated"), FLIPPED, segmenter=Ellipse())
    return calibrate(task, task.segmenter), store


@pytest.fixture
def calibrated(calibrated_once, copy_of):
    """(task, run folder) after the calibration, the test's own."""
    return copy_of(calibrated_once)
