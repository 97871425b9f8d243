"""Trials of a sweep: their settings, and which one is claimed next. Nothing is trained here."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from helpers.sweep_command import A0, A1, B0, B1, record_state, session, settings

from kmine.config.sweep import SweepConfig
from kmine.store.run_folder import RunFolder
from kmine.sweep.trials import ROUND0_FILES, Trial, claim_next, config_of, record_crash, state_of, trial_dir


def claimed(out: Path, trials: list[Trial], since: float = 0.0) -> Trial | None:
    """The next trial; its folder is released."""
    found = claim_next(session(out, *trials, since=since))
    if found:
        found[1].close()
    return found and found[0]


# -- settings


def test_a_trial_has_the_settings_of_the_sweep_and_the_varied_ones(tmp_path):
    cfg = settings(tmp_path, tmp_path, "--fit.lr", "0.5", "--models", "unet", "unetpp", "--data.val_fraction", "0.3")
    loop = config_of(cfg, Trial("mining", "unet", 0.25, 7))
    assert (loop.seed, loop.model.name, loop.data.label_fraction, loop.fit.lr) == (7, "unet", 0.25, 0.5)
    assert (loop.data.val_fraction, loop.data.split_seed, loop.baseline) == (0.3, cfg.data.split_seed, False)
    assert Path(loop.out) == tmp_path / "cells" / "unet-0.25-7-mining"


def test_fractions_are_shares_of_groups_if_the_settings_count_groups(tmp_path):
    cfg = settings(tmp_path, tmp_path, "--data.fine_groups", "0.5")
    part, whole = (config_of(cfg, Trial("supervised", "unet", f, 0)).data for f in (0.25, 1.0))
    assert part.fine_groups == 0.25
    assert (whole.fine_groups, whole.label_fraction) == (None, 1.0), "fine_groups 1 would be one group"


def test_own_settings_apply_to_their_method_or_model_only(tmp_path):
    own = ("mining.fit.lr=0.5", "mining.gate.mode=ranked", "sks.model.encoder=mobilenetv2_100", "sks.fit.lr=0.25")
    cfg = settings(tmp_path, tmp_path, "--models", "unet", "sks", "--set", *own[:2], "--set", *own[2:])
    found = {(m, n): config_of(cfg, Trial(m, n, 0.3, 0)) for m in ("supervised", "mining") for n in ("unet", "sks")}
    assert {key: value.fit.lr for key, value in found.items()} == {
        ("supervised", "unet"): cfg.fit.lr,
        ("supervised", "sks"): 0.25,
        ("mining", "unet"): 0.5,
        ("mining", "sks"): 0.5,
    }
    assert found["mining", "unet"].gate.mode == "ranked" != found["supervised", "unet"].gate.mode
    assert found["mining", "sks"].model.encoder == "mobilenetv2_100"


@pytest.mark.parametrize(("model", "encoder"), [("unet", "mobilenet_v2"), ("sks", "swinv2_tiny_window8_256")])
def test_each_model_has_its_own_default_encoder(model, encoder):
    cfg = SweepConfig(models=["unet", "sks"])
    assert config_of(cfg, Trial("supervised", model, 0.3, 0)).model.encoder == encoder


# -- the next trial


def test_trials_are_claimed_in_order_and_finished_ones_never_again(tmp_path):
    assert claimed(tmp_path, [A0, A1]) == A0
    record_state(tmp_path, A0, "done")
    assert claimed(tmp_path, [A0, A1]) == A1
    record_state(tmp_path, A1, "failed", ended=5.0)
    assert claimed(tmp_path, [A0, A1], since=6.0) == A1, "failed before this command"
    assert claimed(tmp_path, [A0, A1], since=4.0) is None, "failed in this command"


def test_a_locked_trial_is_skipped(tmp_path):
    held = RunFolder(trial_dir(tmp_path, A0))
    assert claimed(tmp_path, [A0]) is None
    assert claimed(tmp_path, [A0, A1]) == A1
    held.close()
    assert claimed(tmp_path, [A0]) == A0


def test_siblings_of_a_trial_in_round_0_are_claimed_last(tmp_path):
    plan = [A0, A1, B0, B1]
    record_state(tmp_path, A0, "running")
    held = RunFolder(trial_dir(tmp_path, A0))
    assert claimed(tmp_path, plan) == B0
    for name in ROUND0_FILES:
        (trial_dir(tmp_path, A0) / name).parent.mkdir(exist_ok=True)
        (trial_dir(tmp_path, A0) / name).touch()
    assert claimed(tmp_path, plan) == A1
    record_state(tmp_path, B0, "done")
    record_state(tmp_path, B1, "done")
    (trial_dir(tmp_path, A0) / ROUND0_FILES[0]).unlink()
    assert claimed(tmp_path, plan) == A1, "nothing else is left"
    held.close()


def test_a_crash_is_recorded_on_the_trial_of_that_process(tmp_path):
    record_state(tmp_path, A0, "running", pid=1, host="elsewhere")
    record_state(tmp_path, A1, "running", pid=1, host=platform.node())
    command = session(tmp_path, A0, A1, B0)
    assert record_crash(command, 2, "reason") is None
    assert record_crash(command, 1, "reason") == A1
    assert (state_of(tmp_path, A1)["status"], state_of(tmp_path, A1)["error"]) == ("failed", "reason")
    assert state_of(tmp_path, A0)["status"] == "running"
