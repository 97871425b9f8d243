"""The auxiliary model: trained once on labels alone; its agreement is evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG, build_task, same, weights

from kmine.methods.mining import mine
from kmine.segmenters.ellipse import Ellipse
from kmine.training import trainer as training
from kmine.training.rounds import trained_auxiliary_model

TWO = replace(CFG, model=replace(CFG.model, name="unetpp+unet"))


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """(task, run folder, what was trained: network and pseudo masks) of two rounds."""
    task, store = build_task(tmp_path_factory.mktemp("mined"), TWO, segmenter=Ellipse())
    trained, real = [], training.fit

    def fit(model, batches, *args, **more):
        trained.append((type(model.net).__name__, batches.pseudo))
        return real(model, batches, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit)
        list(mine(task))
    return task, store, trained


def test_the_second_model_is_evidence_in_every_decision(mined):
    task, store, _ = mined
    assert (task.cfg.model.name, task.auxiliary_model.name) == ("unetpp", "unet")
    for round_idx in (1, 2):
        rows = [row for row in store.decisions(round_idx) if row.is_object]
        assert rows and all(0 <= row.evidence.auxiliary_dice <= 1 for row in rows)


def test_without_a_calibration_the_auxiliary_model_changes_no_weight(task_of):
    task, store = task_of(replace(TWO, rounds=1), segmenter=Ellipse())
    alone, alone_store = task_of(replace(CFG, rounds=1), "alone", segmenter=Ellipse())
    list(mine(task)), list(mine(alone))
    # No threshold is on auxiliary_dice, so not even round 1 differs.
    assert all(same(weights(store, n), weights(alone_store, n)) for n in (0, 1))
    assert all(np.isnan(row.evidence.auxiliary_dice or np.nan) for row in alone_store.decisions(1))


def test_it_is_trained_once_and_never_on_a_pseudo_mask(mined, monkeypatch):
    task, store, trained = mined
    (pseudo,) = [pseudo for name, pseudo in trained if name == "Unet"]
    assert pseudo is None and len(trained) == 4  # rounds 0, 1, 2 and the auxiliary model
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    found, signature = trained_auxiliary_model(task)
    assert same(found.state_dict(), {**found.state_dict(), **weights(store, 0, "witness", "model")}) and signature


def test_another_auxiliary_model_makes_another_round(task_of):
    task, store = task_of(replace(TWO, rounds=1), segmenter=Ellipse())
    list(mine(task))
    other = replace(task, auxiliary_model=replace(task.auxiliary_model, decoder_channels=16))
    list(mine(other))
    first = list(store.decisions(1))
    list(mine(task))
    assert [r.evidence.auxiliary_dice for r in first] != [r.evidence.auxiliary_dice for r in store.decisions(1)]
