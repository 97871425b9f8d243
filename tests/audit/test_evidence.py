"""Reference models, and the ranking of planted faults."""

from __future__ import annotations

import shutil

import numpy as np
from helpers.masks import replace_masks
from helpers.planted_faults import plant

from kmine.audit.evidence import load_reference_models, rank_all_masks
from kmine.audit.rounds import open_audit
from kmine.cli import Terminal


def test_only_models_not_trained_on_a_mask_are_compared_with_it(audited_run, rows):
    for row in rows(audited_run / "audit"):
        names = row["asked_models"].split()
        # A given mask: the model without its fold. A mined mask: all fold models, and round 0 unless it prompted.
        assert len(names) == 1 if row["kind"] == "labeled" else {"fold_0", "fold_1"} <= set(names)
        assert row["kind"] == "pseudo" or names[0].startswith("fold_")
        assert row["asked_by"] not in names


def test_planted_faults_are_in_the_first_fifth(run, monkeypatch):
    """Predictions are blurred true masks, so the ranking is tested and not eight training steps."""
    with open_audit(run, Terminal(quiet=True), device="cpu") as audited:
        task, mined = audited.task, audited.audited_round
        truth = {ref.sample_id: task.val._cache.mask_resized(ref.sample_id) for ref in task.val._cache.refs}

        def blurred(task, models, pool, ids, tta="none"):
            for n, sample_id in enumerate(ids):
                noise = np.random.default_rng(n).normal(0, 0.1, truth[sample_id].shape)
                p = np.clip(np.where(truth[sample_id] == 1, 0.8, 0.1) + noise, 0, 1).astype(np.float32)
                yield sample_id, np.stack([1 - p, p])

        monkeypatch.setattr("kmine.audit.evidence.mean_probabilities", blurred)
        rng = np.random.default_rng(0)
        ids = [i for i in mined.pseudo_labeled if truth[i].any()]
        labeled = {i: truth[i] for i in task.labeled.ids}
        kinds = ("shifted", "neighbour's mask", "flipped", "missing object")
        wrong, wrong_given = (plant(masks, 0.2, rng, kinds) for masks in ({i: truth[i] for i in ids}, labeled))
        masks = {name: wrong[name][1] if name in wrong else truth[name] for name in ids}
        replace_masks(audited.store, mined.round_idx, masks)
        given = task.labeled.with_masks([*labeled], lambda i: wrong_given[i][1] if i in wrong_given else labeled[i])
        pseudo, found = rank_all_masks(task, audited.rounds, mined, with_labeled=True, labeled=given)
    first = [report.sample_id for report in pseudo if report.sample_id in ids][: len(wrong) + 1]
    assert len(wrong) >= 3 and len(wrong.keys() & set(first)) >= 0.8 * len(wrong)
    head = {report.sample_id for report in found[: len(wrong_given) + 1]}
    assert len(wrong_given) >= 2 and len(wrong_given.keys() & head) >= 0.7 * len(wrong_given)
    assert found[0].explanations


def test_fold_models_are_trained_only_if_requested(run):
    for folder in run.glob("fold_*"):
        shutil.rmtree(folder)
    with open_audit(run, Terminal(quiet=True), device="cpu") as audited:
        ids = audited.audited_round.pseudo_labeled
        found = load_reference_models(audited.task, audited.rounds, ids, train_folds=False)
    assert "round_00" in [reference.name for reference in found.references] and not list(run.glob("fold_*"))
