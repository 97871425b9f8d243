"""The loop with a segmenter fine-tuned on the labels: names, artifacts, interruption."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
from helpers.loop_command import SMALL, run_loop

from kmine.mining import crossfit
from kmine.mining.adaptation import finetune as stage
from kmine.mining.adaptation import step as adaptation

SETTINGS = {
    **SMALL,
    "segmenter.name": "tiny",
    "fit.steps": 6,
    "fit.round_steps": 4,
    "fit.val_every": 3,
    "adapt.folds": 2,
    "adapt.fold_steps": 3,
    "adapt.steps": 2,
    "adapt.batch_size": 2,
    "adapt.val_every": 1,
}


def run(out: Path, **changes: object) -> int:
    return run_loop(SETTINGS, out, **changes)


def results(out: Path) -> list[dict[str, str]]:
    """results.csv without the seconds."""
    with (out / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in csv.DictReader(file)]


def read(out: Path, name: str) -> dict:
    return json.loads((out / name).read_text())


@pytest.fixture
def rising_iou(monkeypatch):
    """Each validation of the adaptation has a higher IoU than the one before."""
    rising = itertools.count()
    monkeypatch.setattr(stage, "mean_iou", lambda segmenter, lessons: 0.1 + 0.1 * next(rising))


def test_an_adapted_segmenter_is_named_everywhere(tmp_path, rising_iou):
    out = tmp_path / "run"
    assert run(out) == 0
    about, run_json = read(out, "segmenter/adaptation.json"), read(out, "run.json")
    assert about["used"] and about["base"] == "tiny" and about["best_step"] == 2
    assert (out / "segmenter/adapted.safetensors").exists()
    assert run_json["segmenter"] == "tiny+adapted"
    assert run_json["segmenter_sha256"] != about["base_sha256"]
    report = (out / "report.html").read_text()
    assert "tiny+adapted" in report and "IoU 0.100 -&gt; 0.300" in report
    assert "not SAM&#39;s figures" in report or "not SAM's figures" in report
    assert "tiny+adapted" in (out / "results.csv").read_text()


def test_an_adaptation_without_gain_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "mean_iou", lambda segmenter, lessons: 0.5)
    out = tmp_path / "run"
    assert run(out) == 0
    assert read(out, "run.json")["segmenter"] == "tiny"
    assert not read(out, "segmenter/adaptation.json")["used"]
    assert not (out / "segmenter/adapted.safetensors").exists()
    assert "not used" in (out / "report.html").read_text()


def test_without_adaptation_there_are_no_files_of_it(tmp_path):
    out = tmp_path / "run"
    assert run(out, adapt__enabled="false") == 0
    assert read(out, "run.json")["segmenter"] == "tiny"
    assert not (out / "segmenter").exists() and not list(out.glob("fold_*"))


def test_an_adaptation_interrupted_twice_resumes_to_the_same_result(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole) == 0
    for module, name in ((crossfit, "train"), (adaptation, "adapt")):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after_first(patch, module, name)
            assert run(broken) == 130
    assert run(broken) == 0
    assert read(whole, "segmenter/adaptation.json") == read(broken, "segmenter/adaptation.json")
    assert results(whole) == results(broken)
    assert read(whole, "run.json")["segmenter_sha256"] == read(broken, "run.json")["segmenter_sha256"]


def interrupt_after_first(patch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Ctrl-C at the end of the first call."""
    real = getattr(module, name)

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    patch.setattr(module, name, interrupted)
