"""The loop with `prompts.source auto`; prompts that a segmenter does not support are refused at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.loop_command import OPEN_GATE, SMALL, run_loop

from kmine.segmenters.tiny.segmenter import Tiny
from kmine.store.run_folder import RunFolder

SETTINGS = {
    **SMALL,
    **OPEN_GATE,
    "segmenter.name": "tiny",
    "adapt.enabled": "false",
    "prompts.source": "auto",
    "data.num_samples": 14,
    "fit.steps": 12,
    "fit.round_steps": 4,
    "fit.val_every": 6,
    "refine.ask_local": "false",
}


def run(out: Path, **changes: object) -> int:
    return run_loop(SETTINGS, out, **changes)


@pytest.mark.slow
def test_a_round_mines_the_proposals_of_tiny(tmp_path, monkeypatch):
    counts, real = [], Tiny.propose

    def propose(self, embeddings):
        counts.append(len(embeddings))
        return real(self, embeddings)

    monkeypatch.setattr(Tiny, "propose", propose)
    out = tmp_path / "run"
    assert run(out) == 0
    store = RunFolder(out)
    prompts, decisions = store.prompts(1), [row for row in store.decisions(1) if row.is_object]
    store.close()
    assert sum(counts) > 0 and len(prompts) == len(decisions) > 0
    assert any(row.in_training for row in decisions)
    assert sum(counts) >= len({row.sample_id for row in prompts})
    assert all(row.box is not None and len(row.jittered_boxes) == 3 for row in prompts)
    assert json.loads((out / "run.json").read_text())["segmenter"] == "tiny"
    before = sum(counts)
    assert run(out) == 0 and sum(counts) == before, "a finished run proposes nothing anew"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"segmenter__name": "ellipse"},
            "prompts.source: auto expects a segmenter that proposes masks unprompted, got",
        ),
        (
            {"prompts__source": "local", "prompts__box": "false", "prompts__points": "true"},
            "prompts.box: the segmenter `tiny` expects a box, got points only; set --prompts.box true",
        ),
    ],
)
def test_unsupported_prompts_are_refused_before_any_folder_is_created(tmp_path, capsys, settings, words):
    assert run(tmp_path / "run", **settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
