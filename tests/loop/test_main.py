"""`kmine loop` as a command: what it prints, and which process of a distributed launch prints it."""

from __future__ import annotations

import pytest

from kmine.config import DataConfig, LoopConfig, SegmenterConfig
from kmine.loop import __main__ as command
from kmine.loop import engine
from kmine.loop.engine import LoopResults
from kmine.report.inputs import RoundRow
from kmine.types import Metrics, RoundResult


@pytest.fixture
def cfg(tmp_path):
    data = DataConfig(num_samples=8, size=32)
    return LoopConfig(
        out=str(tmp_path / "run"), rounds=2, device="cpu", data=data, segmenter=SegmenterConfig("ellipse")
    )


@pytest.fixture
def calls(monkeypatch):
    """Replaces the rounds by a result of one round; records the data set and whether progress is shown."""
    found = []

    def run_rounds(cfg, terminal, source, plan):
        found.append((source and source.name, terminal.console.quiet))
        if terminal.console.quiet:
            return None
        row = RoundRow(0, 3, 0, 0.5, 0.4, 2.0, 1, 0.45, True)
        metrics = Metrics((), 0.5, 0.4, 2.0, 1, 0)
        mined = [RoundResult(n, 3, 0, metrics, metrics, True, {"fit": 40.0}, retrained=n == 2) for n in range(3)]
        baselines = {"supervised_once": mined[2:], "supervised": mined[:1]}
        commands = [("kmine audit run", "review"), ("kmine predict run IMAGES", "new images")]
        return LoopResults(mined, baselines, [row], "ellipse", "no_pseudo_masks", commands=commands)

    monkeypatch.setattr(engine, "run_rounds", run_rounds)
    return found


def test_the_table_the_reason_and_the_files_are_printed(cfg, calls, capsys):
    assert command.run_loop(cfg) == 0
    assert calls == [("phantom", False)]
    out, err = capsys.readouterr()
    assert out == "" and "validation, per round (segmenter: ellipse)" in err and "0.500" in err
    assert "stopped after round 1 of 2: " in err, "the retrained model is no round of mining"
    assert "baselines on validation, the better one first: supervised_once 0.500, supervised 0.500\n" in err
    assert f"results: {cfg.out}/results.csv   report: {cfg.out}/report.html\n" in err
    assert err.splitlines()[-2:] == [
        "next: kmine audit run           review",
        "next: kmine predict run IMAGES  new images",
    ]
    assert err.splitlines()[-3].startswith("time: ") and "rounds of mining: fit 2.0 min" in err


@pytest.mark.parametrize(("rank", "is_quiet"), [("0", False), ("1", True)])
def test_only_the_first_process_of_a_launch_prints_and_none_opens_data_early(
    cfg, calls, capsys, monkeypatch, rank, is_quiet
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", rank)
    assert command.run_loop(cfg) == 0
    assert calls == [(None, is_quiet)]
    assert bool(capsys.readouterr().err) is not is_quiet


def test_a_wrong_name_is_one_line_and_creates_no_folder(tmp_path, calls, capsys):
    assert command.main(["--model.name=unett", f"--out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("kmine loop: error: model.name: unknown name 'unett'")
    assert not calls and not (tmp_path / "run").exists()
