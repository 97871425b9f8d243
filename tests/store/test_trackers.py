"""Trackers: refused before the run where they are missing, left out with one line where they fail later."""

from __future__ import annotations

import importlib.util
import os

import pytest

from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.store import trackers
from kmine.store.history import track
from kmine.store.run_folder import RunFolder


class Logger:
    """A logger of Lightning, as far as it is used."""

    def __init__(self, version="id-1", broken=""):
        self.version, self.broken, self.calls = version, broken, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            if name == self.broken:
                raise ConnectionError("no answer\nat all")

        return call


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    store, store.said = RunFolder(tmp_path / "run"), []
    store.log = store.said.append
    return store


def opened(monkeypatch, logger):
    given = []
    monkeypatch.setitem(
        trackers._OPENERS, "mlflow", lambda root, run_id, offline: given.append((run_id, offline)) or logger
    )
    return given


def test_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log: expected the package wandb.*pip install 'kmine\[wandb\]'.*leave out"):
        trackers.require_trackers(["wandb"])


def test_the_setting_names_each_tracker_once():
    assert LoopConfig(log=["wandb", "mlflow"]).log == ["wandb", "mlflow"]
    for wrong in (["wandb", "wandb"], ["comet"]):
        with pytest.raises(UserError, match="log: expected some of tensorboard, wandb, mlflow, each once"):
            LoopConfig(log=wrong)


def test_settings_figures_and_the_end_are_sent_and_a_resumed_run_goes_on_with_its_id(run, monkeypatch):
    logger = Logger()
    given = opened(monkeypatch, logger)
    trackers.open_trackers(run, ["mlflow"], {"fit.lr": 1}, offline=True)
    track(run, {"mining/dice": 0.5}, 3)
    run.close()
    assert logger.calls == [
        ("log_hyperparams", {"fit.lr": 1}),
        ("log_metrics", {"mining/dice": 0.5}, 3),
        ("finalize", "success"),
    ]
    again = RunFolder(run.root)
    trackers.open_trackers(again, ["mlflow"], {}, offline=False)
    assert given == [(None, True), ("id-1", False)]
    again.close()


def test_a_tracker_that_does_not_answer_is_refused_before_the_run(run, monkeypatch):
    opened(monkeypatch, Logger(broken="log_hyperparams"))
    with pytest.raises(UserError, match=r"log: mlflow cannot be opened \(ConnectionError: no answer at all\); start"):
        trackers.open_trackers(run, ["mlflow"], {}, offline=False)


def test_one_that_fails_later_costs_one_line_and_nothing_else(run, monkeypatch):
    logger = Logger(broken="log_metrics")
    opened(monkeypatch, logger)
    trackers.open_trackers(run, ["mlflow"], {}, offline=False)
    track(run, {"a": 1.0}, 1)
    track(run, {"a": 2.0}, 2)
    run.close()
    assert [call[0] for call in logger.calls] == ["log_hyperparams", "log_metrics"]
    (line,) = run.said
    assert "mlflow gets no more figures" in line and "history.csv has all of them" in line


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_each_works_without_network(name, tmp_path, monkeypatch):
    """Where its package is installed."""
    pytest.importorskip(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    run = RunFolder(tmp_path / "run")
    trackers.open_trackers(run, [name], {"fit.lr": 1e-3}, offline=True)
    track(run, {"mining/round_00/loss": 0.25}, 10)
    run.close()
    files = [path for path in run.root.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert any(b"mining/round_00/loss" in path.read_bytes() or path.match("*/mining/round_00/loss") for path in files)
