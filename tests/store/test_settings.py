"""Which settings may change when a run is resumed."""

from __future__ import annotations

import shlex

import pytest
import yaml

from kmine import cli
from kmine.config import FitConfig, LoopConfig
from kmine.store.settings import BEFORE, RESUMABLE_CHANGES, as_flags, filled, settings_changes, signed

OLD = {"rounds": 2, "out": "a", "fit": {"steps": 4, "num_workers": 0}}


def test_resumable_settings_are_settings_of_the_loop():
    assert set(RESUMABLE_CHANGES) <= cli.flat(cli.to_dict(LoopConfig())).keys()


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (OLD, []),
        (OLD | {"out": "b", "fit": {"steps": 4, "num_workers": 2}}, []),
        (OLD | {"rounds": 3}, []),
        (OLD | {"rounds": 1}, [("rounds", 2, 1)]),
        (OLD | {"fit": {"steps": 5, "num_workers": 0}}, [("fit.steps", 4, 5)]),
        (OLD | {"seed": 1}, [("seed", None, 1)]),
    ],
)
def test_only_changes_of_results_forbid_resuming_and_more_rounds_do_not(after, changes):
    assert settings_changes(OLD, after) == changes


def older_config(**given):
    """Settings of a run as saved by a version without those of `BEFORE`."""
    values = cli.to_dict(LoopConfig())
    for name in BEFORE:
        section, _, key = name.rpartition(".")
        del (values[section] if section else values)[key]
    for name, value in given.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    return values


def test_settings_that_an_older_run_lacks_have_the_values_of_its_time(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(older_config(fit__dice="auto")))
    (tmp_path / "run.json").write_text("{}")
    cfg = cli.load_config(LoopConfig, path, ["--seed", "4"])
    values = cli.flat(cli.to_dict(cfg))
    assert {name: values[name] for name in BEFORE} == BEFORE | {"fit.dice": "auto"}
    assert cfg.seed == 4


def test_a_run_with_the_values_of_its_time_can_be_resumed_and_others_are_named():
    old, new = older_config(), cli.to_dict(LoopConfig())
    was = filled(cli.flat(new)) | BEFORE
    again = {key: value for key, value in was.items() if key not in BEFORE}
    assert settings_changes(old, again) == []
    assert ("fit.dice", "batch", "auto") in settings_changes(old, new)


def test_values_from_before_a_setting_are_not_signed():
    settings = signed("fit", FitConfig(dice="batch", scale=(0.8, 1.25), flips="none"))
    assert not {"dice", "scale"} & settings.keys()
    assert settings["flips"] == "none" and settings["steps"] == FitConfig.steps
    assert signed("fit", {"dice": "image", "lr": 1.0}) == {"dice": "image", "lr": 1.0}


def test_an_older_run_is_resumed_by_the_flags_that_its_refusal_names(tmp_path):
    old = older_config()
    words = as_flags(settings_changes(old, cli.to_dict(LoopConfig())))
    assert "--fit.dice batch" in words and "--fit.scale '[0.8, 1.25]'" in words
    cfg = cli.parse(LoopConfig, shlex.split(words), prog="kmine loop", description="")
    assert settings_changes(old, cli.to_dict(cfg)) == []
