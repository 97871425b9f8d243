"""The stages of mining side by side: what comes out is what they give one after the other."""

from __future__ import annotations

from dataclasses import replace
from threading import get_ident

import numpy as np
import pytest
from helpers.small import CFG, truth_of

from kmine.io.threads import thread_pool
from kmine.mining import pipeline
from kmine.mining.candidates import (
    gate_batch,
    generate_prompts,
    predict_auxiliary,
    read_batch,
    refine_batch,
    segment_prompts,
)
from kmine.mining.pipeline import pending_batches, predict_batches, prompt_batches, save_batches, segment_batches
from kmine.mining.round import close_round, open_round
from kmine.mining.tables import table_rows
from kmine.store.table_files import encode_table
from kmine.store.tables import DecisionRow
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.types import Probs


@pytest.fixture
def opened(task_of, monkeypatch):
    """A round of batches of 4 whose local model sees the true objects, and the threads that its networks ran in."""
    task = replace(task_of(CFG)[0], mining_batch_size=4)
    truth, threads = truth_of(task), set()

    def see(ctx, batch):
        threads.add(get_ident())
        seen = [0.05 + 0.9 * (truth.sample(i).mask > 0).astype(np.float32) for i in batch.ids]
        return [Probs(i, np.stack([1 - p, p])) for i, p in zip(batch.ids, seen, strict=True)]

    monkeypatch.setattr(pipeline, "predict_probs", see)
    model = new_model(task)
    student = Checkpoints("student", dict(model.state_dict()), {}, 0.0)
    return open_round(task, model, student, None, 1), see, threads


def mine_all(ctx) -> None:
    with thread_pool() as workers:
        batches = predict_batches(ctx, pending_batches(ctx, workers))
        save_batches(ctx, workers, segment_batches(ctx, prompt_batches(ctx, workers, batches)))


@pytest.mark.parametrize("source", ["local", "auto"])
def test_side_by_side_and_one_after_the_other_are_the_same(opened, source):
    ctx, see, threads = opened
    cfg = replace(CFG, prompts=replace(CFG.prompts, source=source))
    ctx = replace(ctx, task=replace(ctx.task, cfg=cfg))
    rows, masks = [], {}
    for batch_idx, ids in ctx.pending:
        batch = read_batch(ctx, ids, batch_idx)
        probs = see(ctx, batch)
        objects = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
        decisions = gate_batch(ctx, batch, probs, *objects, predict_auxiliary(ctx, batch))
        labels = refine_batch(ctx, batch, probs, *objects, decisions)
        rows += table_rows(batch.images, *objects, decisions, labels)[1]
        masks |= {i: label.mask for i, label in zip(batch.ids, labels, strict=True) if label}
    mine_all(ctx)
    made = close_round(ctx)
    expected, written = (encode_table(table, DecisionRow, "s") for table in (rows, ctx.task.run.decisions(1)))
    assert written == expected and len(masks) > 5
    assert list(made) == list(masks) and all(np.array_equal(made[i].mask, mask) for i, mask in masks.items())
    assert ctx.timer.seconds.keys() == {"read", "prompts", "segment", "gate", "refine", "store", "changes"}
    assert threads == {get_ident()}, "networks run in the calling thread"


def test_few_batches_are_in_memory(opened, monkeypatch):
    ctx, *_ = opened
    ctx = replace(ctx, pending=tuple((n, ids[:1]) for n, (_, ids) in enumerate(ctx.pending * 5)))
    alive, started, saved, read, save = [], [], [], pipeline.read_batch, pipeline.save_batch

    def reading(*args):
        started.append(args)
        alive.append(len(started) - len(saved))
        return read(*args)

    def saving(*args):
        save(*args)
        saved.append(args)

    monkeypatch.setattr(pipeline, "read_batch", reading)
    monkeypatch.setattr(pipeline, "save_batch", saving)
    mine_all(ctx)
    assert len(started) == len(saved) == len(ctx.pending) and max(alive) <= 3 * pipeline.DEPTH < len(ctx.pending)


@pytest.mark.parametrize("stage", ["read_batch", "generate_prompts", "gate_batch", "segment_prompts"])
@pytest.mark.parametrize("error", [OSError("a fault"), KeyboardInterrupt()])
def test_an_error_ends_the_round_and_leaves_whole_batches(opened, monkeypatch, stage, error):
    ctx, *_ = opened
    calls, real = [], getattr(pipeline, stage)

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(pipeline, stage, failing)
    with pytest.raises(type(error)):
        mine_all(ctx)
    monkeypatch.setattr(pipeline, stage, real)
    task = ctx.task
    again = replace(ctx, pending=tuple(task.run.pending_batches(1, ctx.signature, task.unlabeled.ids, 4)))
    mine_all(again)
    assert len(close_round(again)) > 5
