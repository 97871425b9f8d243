"""Rows of audit.csv and history lines over the rounds of a run."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from helpers.masks import mask_ids

from kmine.audit.evidence import rank_all_masks
from kmine.audit.history import COLUMNS, MaskHistory
from kmine.audit.rounds import open_audit
from kmine.cli import Terminal
from kmine.mining.crossfit import unlabeled_parts


def test_every_mask_has_one_row_with_its_history(audited_run, rows):
    found = rows(audited_run / "audit")
    assert tuple(found[0]) == COLUMNS
    pseudo = [row for row in found if row["kind"] == "pseudo"]
    last = max(int(p.name[-2:]) for p in audited_run.glob("round_*"))
    masks = mask_ids(audited_run / f"round_{last:02}" / "pseudo_masks")
    assert len(pseudo) == len(masks) > 3
    assert [int(row["rank"]) for row in pseudo] == list(range(1, len(pseudo) + 1))
    values = [float(row["suspicion"]) for row in pseudo]
    assert values == sorted(values, reverse=True)
    for row in pseudo:
        assert row["made_by"] and row["model_sha256"] and row["segmenter"] == "ellipse" and row["reason"]
        assert row["withheld_dice"] == "" and int(row["entered"]) <= int(row["round"])
    labeled = [row for row in found if row["kind"] == "labeled"]
    with (audited_run / "splits.csv").open(newline="") as file:
        splits = list(csv.DictReader(file))
    assert {row["sample_id"] for row in labeled} == {row["sample_id"] for row in splits if row["split"] == "labeled"}


def test_lines_items_and_layers_follow_the_rounds(run):
    with open_audit(run, Terminal(quiet=True), device="cpu") as audited:
        pseudo, given = rank_all_masks(audited.task, audited.rounds, audited.audited_round, with_labeled=True)
        history = MaskHistory(audited)
        first, second = history.lines(pseudo[0])
        assert first.startswith("round 1: ") and second.startswith("round 2: ") and "segmenter ellipse" in second
        assert "used in training" in second and "by the model of round 0 (" in first
        mined, sample_id = audited.rounds[-1], pseudo[0].sample_id
        drawn = [replace(row, origin="person") for row in mined.prompts.get(sample_id, [])]
        line = history._line(replace(mined, prompts={sample_id: drawn}), sample_id)
        assert f"round 2: {len(drawn)} prompted object(s), {len(drawn)} from prompts of a person, the others by" in line
        rows = [history.row(report) for report in pseudo]
        parts = enumerate(unlabeled_parts(audited.task))
        assert {row["sample_id"]: row["asked_by"] for row in rows}.items() <= {
            i: f"part_{part}/round_01" for part, ids in parts for i in ids
        }.items(), "the model that was trained without the image"
        number = rows[0]["asked_by"][5]
        own = audited.store.weights_signature(run / f"part_{number}" / "round_01" / "model.safetensors")
        assert (rows[0]["model_signature"], rows[0]["model_sha256"]) == own and own[1]
        assert f"by the model of round 1 (part_{number}, {own[0][:8]}" in second
        assert history.lines(given[0])[0].startswith("given; compared with: fold_")
        before, mined = (audited.store.pseudo_mask(n, pseudo[0].sample_id) == 1 for n in (1, 2))
        dice = 2 * (before & mined).sum() / (before.sum() + mined.sum())
        assert history.row(pseudo[0])["dice_with_round_before"] == pytest.approx(dice, abs=1e-4)
        for item in history.items([pseudo[0], given[0]], run / "page", None, None):
            names = {layer.name for layer in item.layers}
            assert names == ({"pseudo", "local", "segmenter", "model"} if item.kind == "pseudo" else {"given", "model"})
            assert (run / "page" / item.picture).stat().st_size > 100 and bool(item.prompts) == (item.kind == "pseudo")
