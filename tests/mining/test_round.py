"""A mining round: batches left by an interrupted session, reviewed images, and reading changes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG

from kmine.feedback.verdict_effects import NO_VERDICTS
from kmine.io.files import encode_png
from kmine.io.threads import thread_pool
from kmine.mining.pipeline import pending_batches, save_batch
from kmine.mining.round import close_round, log_full_images, open_round
from kmine.store.tables import DecisionRow
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.types import PseudoLabel


@pytest.fixture
def mined(task_of):
    """A task with batches of 5, its model, and checkpoints of a student that was not trained."""
    task = replace(task_of(CFG)[0], mining_batch_size=5)
    model = new_model(task)
    return task, model, Checkpoints("student", dict(model.state_dict()), {}, 0.0)


@pytest.fixture
def workers():
    with thread_pool() as pool:
        yield pool


def save_empty(ctx, batch, labels=None) -> None:
    """Save a batch in which no object was found."""
    nothing = [[] for _ in batch.images]
    save_batch(ctx, batch, nothing, nothing, nothing, labels or [None for _ in batch.images])


def test_an_interrupted_round_continues_with_the_batches_that_are_left(mined, workers):
    task, model, student = mined
    ctx = open_round(task, model, student, None, 1)
    ids = list(task.unlabeled.ids)
    assert [i for _, batch in ctx.pending for i in batch] == ids and len(ctx.pending) > 1
    save_empty(ctx, next(pending_batches(ctx, workers)))
    again = open_round(task, model, student, None, 1)
    assert again.pending == ctx.pending[1:] and again.signature == ctx.signature
    for batch in pending_batches(again, workers):
        save_empty(again, batch)
    assert not close_round(again)
    assert open_round(task, model, student, None, 1).pending == ()
    other = open_round(task, model, replace(student, signature="other"), None, 1)
    assert other.pending == ctx.pending, "a student of another training mines again"


def test_a_closed_round_has_its_seconds_reasons_and_changes(mined, workers):
    task, model, student = mined
    ctx = open_round(task, model, student, None, 1)
    first = task.unlabeled.ids[0]
    for batch in pending_batches(ctx, workers):
        shapes = [image.image.shape[:2] for image in batch.images]
        labels = [PseudoLabel(np.zeros(shape, np.uint8), "lesion_free") for shape in shapes]
        save_empty(ctx, batch, [label if i == first else None for i, label in zip(batch.ids, labels, strict=True)])
    labels = close_round(ctx)
    assert list(labels) == [first] and labels[first].lesion_free and labels.pool.empty == {first}
    assert list(labels.seconds) == ["read", "changes"]
    changes = task.run.read_json(task.run.round_dir(1) / "changes.json")
    assert changes["new"] == [first] and changes["num_empty"] == 1
    written = (task.run.round_dir(1) / "changes.json").stat().st_mtime_ns
    close_round(ctx)
    assert (task.run.round_dir(1) / "changes.json").stat().st_mtime_ns == written, "read back"


def test_images_with_as_many_objects_as_are_prompted_are_logged(mined, monkeypatch):
    task, *_ = mined
    lines = []
    monkeypatch.setattr(task.progress, "log", lines.append)
    task = replace(task, cfg=replace(task.cfg, prompts=replace(task.cfg.prompts, max_objects=2)))
    of = {"kept": False, "reason": "mined"}
    rows = [DecisionRow(i, n, 1, **of) for i, count in (("a", 3), ("b", 2), ("c", 1)) for n in range(count)]
    log_full_images(task, 1, [*rows, DecisionRow("d", 0, 1, **of), DecisionRow("d", 1, 2, **of)])
    start = f"round 1: 2 of {len(task.unlabeled)} images have 2 objects of a class or more"
    assert len(lines) == 1 and lines[0].startswith(start)
    log_full_images(replace(task, cfg=replace(task.cfg, prompts=replace(task.cfg.prompts, max_objects=None))), 1, rows)
    assert len(lines) == 1


def test_reviewed_images_are_saved_behind_the_others_and_not_segmented(mined, workers, tmp_path):
    task, model, student = mined
    accepted, rejected = task.unlabeled.ids[:2]
    mask = np.ones(task.unlabeled.native_shape(accepted), np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(mask, "", 0))
    review = replace(NO_VERDICTS, rejected=frozenset([rejected]), accepted={accepted: tmp_path / "a.png"})
    ctx = open_round(replace(task, review=review), model, student, None, 1)
    batch = next(pending_batches(ctx, workers))
    assert list(batch.reviewed) == [accepted, rejected] and batch.ids == list(task.unlabeled.ids[2:5])
    for batch in pending_batches(ctx, workers):
        save_empty(ctx, batch)
    labels = close_round(ctx)
    assert [row.sample_id for row in task.run.decisions(1)][:5] == [*task.unlabeled.ids[2:5], rejected, accepted]
    assert list(labels) == [accepted] and np.array_equal(labels[accepted].mask, mask)
