"""Settings of a sweep: lists without repeats, settings of single methods."""

from __future__ import annotations

import pytest

from kmine.config import DataConfig, ModelConfig
from kmine.config.sweep import SweepConfig
from kmine.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fractions", []),
        ("fractions", [0.1, 0.1]),
        ("fractions", [1.5]),
        ("seeds", [-1]),
        ("methods", ["minning"]),
        ("processes", 0),
        ("address", "auto"),
    ],
)
def test_unfit_lists_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}: "):
        SweepConfig(**{name: value})


def test_models_default_to_the_model_of_the_loop():
    assert SweepConfig(model=ModelConfig(name="unet")).models == ["unet"]
    assert SweepConfig(models=["unet", "sks"]).models == ["unet", "sks"]


def test_settings_of_a_method_are_grouped_by_its_name():
    cfg = SweepConfig(set=["mining.gate.target_dice=0.9", "mining.rounds_x=1", "supervised.fit.lr=0.1"])
    assert cfg.own_settings() == {
        "mining": {"gate.target_dice": "0.9", "rounds_x": "1"},
        "supervised": {"fit.lr": "0.1"},
    }


@pytest.mark.parametrize(
    "assignment", ["mining", "mining.fit.lr", "oracel.fit.lr=1", "mining.data.size=64", "mining.seed=1"]
)
def test_settings_that_all_trials_share_or_that_are_none_are_refused(assignment):
    with pytest.raises(UserError, match=r"^set: "):
        SweepConfig(set=[assignment])


def test_folds_are_not_for_a_sweep():
    with pytest.raises(UserError, match=r"^data\.folds: expected null in a sweep"):
        SweepConfig(data=DataConfig(folds=5))
    assert SweepConfig(data=DataConfig(folds=5, fold=1)).data.num_runs == 1
