"""Methods by name: where each writes, who may read true masks, and methods of other packages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.small import CFG, same, truth_of, weights

from kmine.config.sweep import METHODS, ORACLE, SweepConfig
from kmine.errors import UserError
from kmine.methods.registry import method, method_dir_of, register_method
from kmine.training.rounds import train_rounds

NAMES = ("supervised", "supervised_once", "self_training", "mean_teacher", "fixmatch", "unimatch", "mining")


def test_every_method_writes_into_its_folder_and_shares_round_0(task_of):
    few = replace(CFG.fit, steps=2, round_steps=1, val_every=2)
    cfg = replace(CFG, rounds=1, segmenter=replace(CFG.segmenter, name="ellipse"), fit=few)
    assert {*NAMES, ORACLE} == {*METHODS.names()}
    starts = []
    for name in NAMES:
        task, store = task_of(cfg, name)
        rounds = list(method(name)(task))
        assert store.round_dir(rounds[-1].round_idx, method_dir_of(name)).joinpath("metrics.json").exists()
        starts += [weights(store, 0)] if name != "supervised_once" else []  # it starts from the initial weights
    assert all(same(starts[0], other) for other in starts[1:])


def test_only_the_oracle_gets_the_truth(task_of):
    task, _ = task_of(replace(CFG, rounds=0))
    truth = truth_of(task)
    for name in NAMES:
        with pytest.raises(ValueError, match="for the oracle alone"):
            method(name, truth)
        with pytest.raises(TypeError):
            method(name)(task, truth)
    with pytest.raises(ValueError, match="for the oracle alone"):
        method(ORACLE)
    with pytest.raises(UserError, match="did you mean fixmatch"):
        method("fixmach")
    assert len(list(method(ORACLE, truth)(task))) == 1


def test_a_registered_method_runs_by_its_name(task_of, monkeypatch):
    monkeypatch.setattr(METHODS, "_registered", {})
    task, store = task_of(replace(CFG, rounds=1))
    register_method("twice", lambda task: train_rounds(task, "twice"))
    assert [r.round_idx for r in method("twice")(task)] == [0, 1]
    assert store.round_dir(1, method_dir_of("twice")).joinpath("metrics.json").exists()
    assert SweepConfig(methods=["twice", "mining"]).methods == ["twice", "mining"]
    with pytest.raises(UserError, match="kmine's own"):
        register_method("mining", lambda task: iter(()))
