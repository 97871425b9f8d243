"""Rounds read from a run folder: which one is audited, what its tables say."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.masks import mask_ids, replace_masks

from kmine.audit import __main__ as audit_command
from kmine.audit.rounds import MinedRound, load_rounds, open_audit, select_round
from kmine.cli import Terminal
from kmine.errors import UserError
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import RowsBySample, TableRows
from kmine.store.tables import DecisionRow, PromptRow


def mined(number: int, adopted: bool, *ids: str) -> MinedRound:
    tables = RowsBySample(TableRows([], DecisionRow)), RowsBySample(TableRows([], PromptRow))
    return MinedRound(number, f"signature {number}", 0, adopted, *tables, list(ids))


def test_the_last_adopted_round_with_masks_is_audited(tmp_path):
    rounds = [mined(1, True, "a"), mined(2, True), mined(3, False, "b")]
    assert select_round(rounds, None, tmp_path).round_idx == 1
    assert select_round(rounds, 3, tmp_path).round_idx == 3
    assert select_round([replace(rounds[0], adopted=False), rounds[2]], None, tmp_path).round_idx == 3
    assert select_round(rounds, 2, tmp_path).round_idx == 2  # without masks: the given ones are audited alone
    assert select_round(rounds[1:2], None, tmp_path).round_idx == 2
    of_kept = [select_round(rounds, None, tmp_path, kept=kept).round_idx for kept in (0, 1, 3, 4)]
    assert of_kept == [1, 1, 3, 3], "round 4 is a retrained model"
    with pytest.raises(UserError, match="--round 4: expected one of 1, 2, 3"):
        select_round(rounds, 4, tmp_path)
    with pytest.raises(UserError, match="found no pseudo masks"):
        select_round([], None, tmp_path)


def test_rounds_agree_with_the_folder(audited_run):
    store = RunFolder(audited_run, follows=True)
    first, second = load_rounds(store)
    assert (first.round_idx, second.round_idx, first.prompting_round) == (1, 2, 0)
    assert second.prompting_round == (1 if first.adopted else 0) and first.signature != second.signature
    files = {*mask_ids(audited_run / "round_02" / "pseudo_masks")}
    assert set(second.pseudo_labeled) == files == {i for i in second.decisions if second.has_pseudo_mask(i)}
    for sample_id in second.pseudo_labeled:
        assert len(second.kept_objects(sample_id)) <= len(second.objects(sample_id))


def test_the_signature_of_the_audited_masks_depends_on_the_round(audited_run):
    signatures = []
    for number in (1, 2, None):
        with open_audit(audited_run, Terminal(quiet=True), round_idx=number, device="cpu") as audited:
            signatures.append((audited.audited_round.round_idx, audited.signature))
    assert signatures[0][1] != signatures[1][1] and signatures[2] in signatures[:2]


def test_a_pseudo_mask_of_another_size_with_the_right_signature_is_one_line(audited_run, tmp_path, capsys):
    run = RunFolder(shutil.copytree(audited_run, tmp_path / "run"), follows=True)
    last = load_rounds(run)[-1]
    path = replace_masks(run, last.round_idx, {last.pseudo_labeled[0]: np.ones((5, 7), np.uint8)})
    words = [str(run.root), "--no_labeled", "--device=cpu", f"--round={last.round_idx}"]
    assert audit_command.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said.startswith(f"kmine audit: error: {path}: expected a pseudo mask of {last.pseudo_labeled[0]} of (")
        and "got (5, 7); remove" in said
    )
