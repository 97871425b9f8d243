"""Settings that are younger than a run have the values of its time."""

from __future__ import annotations

import pytest

from kmine import cli
from kmine.config import FitConfig, LoopConfig
from kmine.io.older_settings import BEFORE, older_settings


def test_every_older_setting_is_a_setting_of_today():
    assert set(BEFORE) <= cli.flat(cli.to_dict(LoopConfig())).keys()


@pytest.mark.parametrize("record", ["run.json", "sweep.json"])
def test_only_the_config_of_a_run_or_sweep_has_them(tmp_path, record):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\nfit: {clip_grad: 2.0}\n")
    words = ["--config", str(path), "--fit.scale", "[0.5, 2]"]
    today = cli.parse(LoopConfig, words, prog="kmine loop", description="")
    assert older_settings(path) == {} and today.fit.dice == FitConfig.dice == "auto"
    (tmp_path / record).write_text("{}")
    older = cli.parse(LoopConfig, words, prog="kmine loop", description="")
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in cli.flat(cli.to_dict(older)).items()}
    own = {"fit.clip_grad": 2.0, "fit.scale": [0.5, 2.0]}
    assert older.seed == 3 and {name: values[name] for name in BEFORE} == BEFORE | own
    assert older_settings(tmp_path / "other.yaml") == {}


def test_settings_that_are_no_more_are_passed_over_in_a_run_and_named_elsewhere(tmp_path):
    path, words = tmp_path / "config.yaml", ["--config", str(tmp_path / "config.yaml")]
    path.write_text("seed: 3\ngate: {mode: thresholds, min_agreement: 0.5, max_tta_std: 1.0}\n")
    with pytest.raises(SystemExit):
        cli.parse(LoopConfig, words, prog="kmine loop", description="")
    (tmp_path / "run.json").write_text("{}")
    older = cli.parse(LoopConfig, words, prog="kmine loop", description="")
    assert (older.seed, older.gate.mode, older.crossfit, older.refine.doubt) == (3, "thresholds", 1, 0.5)


def test_the_error_on_a_removed_setting_names_what_there_is_instead(capsys):
    with pytest.raises(SystemExit):
        cli.parse(LoopConfig, ["--gate.min_agreement", "0.5"], prog="kmine loop", description="")
    assert (
        "unknown setting gate.min_agreement; the gate keeps a share of the objects, gate.keep"
        in capsys.readouterr().err
    )
