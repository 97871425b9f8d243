"""Which settings may change when a run is resumed."""

from __future__ import annotations

import pytest

from kmine import cli
from kmine.config import LoopConfig
from kmine.store.settings import RESUMABLE_CHANGES, settings_changes

BEFORE = {"rounds": 2, "out": "a", "fit": {"steps": 4, "num_workers": 0}}


def test_resumable_settings_are_settings_of_the_loop():
    assert set(RESUMABLE_CHANGES) <= cli.flat(cli.to_dict(LoopConfig())).keys()


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (BEFORE, []),
        (BEFORE | {"out": "b", "fit": {"steps": 4, "num_workers": 2}}, []),
        (BEFORE | {"rounds": 3}, []),
        (BEFORE | {"rounds": 1}, [("rounds", 2, 1)]),
        (BEFORE | {"fit": {"steps": 5, "num_workers": 0}}, [("fit.steps", 4, 5)]),
        (BEFORE | {"seed": 1}, [("seed", None, 1)]),
    ],
)
def test_only_changes_of_results_forbid_resuming_and_more_rounds_do_not(after, changes):
    assert settings_changes(BEFORE, after) == changes
