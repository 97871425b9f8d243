"""The stages of mining one after the other for each batch, and side by side for several.

Each stage takes the batches of the one before as a stream, and draws the next batch while threads still work on the
last: read by threads -> local model -> prompts by threads -> segmenter -> gate, refinement and saving by threads.
Networks run in the thread that draws. Memory holds some `DEPTH` batches a stage. Batches and results are in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor as Pool
from typing import NamedTuple

from kmine.io.threads import ahead, thread_pool
from kmine.mining.candidates import (
    gate_batch,
    generate_prompts,
    predict_auxiliary,
    predict_probs,
    prompts_need_networks,
    read_batch,
    refine_batch,
    segment_prompts,
)
from kmine.mining.context import ImageBatch, RoundContext
from kmine.mining.pseudo_labels import reviewed_labels
from kmine.mining.tables import table_rows
from kmine.training.distributed import shard
from kmine.training.task import StageTimer
from kmine.types import Candidate, Decision, Probs, Prompts, PseudoLabel

DEPTH = 2
"""Batches that a stage of threads has drawn: the one that is used next, and one that is worked on."""

PredictedBatch = tuple[ImageBatch, list[Probs]]


class SegmentedBatch(NamedTuple):
    """A batch after the last network; lists have one entry per image."""

    batch: ImageBatch
    probs: list[Probs]
    auxiliary_probs: list[Probs | None]
    prompts: list[list[Prompts]]
    candidates: list[list[Candidate]]


def mine_batches(ctx: RoundContext) -> None:
    """One pass over this process's share of the batches left: probs -> prompts -> candidates -> decisions -> masks."""
    # Networks run in this thread; other threads read the next batches, and prompt, gate, refine and save beside it.
    with thread_pool() as workers:
        batches = pending_batches(ctx, workers)
        probs = predict_batches(ctx, batches)  # the local model, of each image the one that was trained without it
        prompts = prompt_batches(ctx, workers, probs)  # boxes, points, mask inputs
        candidates = segment_batches(ctx, prompts)  # the promptable segmenter, once or twice
        save_batches(ctx, workers, candidates)  # what is kept, by its evidence, and the pseudo masks


def pending_batches(ctx: RoundContext, workers: Pool) -> Iterator[ImageBatch]:
    """This process's share of the batches left to mine, read ahead."""
    pending = shard(ctx.pending, ctx.task.fabric)
    for batch in ahead(workers, lambda item: read_batch(ctx, item[1], item[0]), pending, DEPTH):
        ctx.timer.lap("read")
        yield batch


def predict_batches(ctx: RoundContext, batches: Iterable[ImageBatch]) -> Iterator[PredictedBatch]:
    """Batches with the local model's probabilities."""
    return ((batch, predict_probs(ctx, batch)) for batch in batches)


def prompt_batches(
    ctx: RoundContext, workers: Pool, predicted: Iterable[PredictedBatch]
) -> Iterator[tuple[ImageBatch, list[Probs], list[list[Prompts]]]]:
    """Batches with their prompts; by threads, unless prompts need a network."""

    def prompt(of_batch: PredictedBatch) -> tuple[ImageBatch, list[Probs], list[list[Prompts]]]:
        return *of_batch, generate_prompts(ctx, *of_batch)

    stage = map(prompt, predicted) if prompts_need_networks(ctx) else ahead(workers, prompt, predicted, DEPTH)
    for prompted in stage:
        ctx.timer.lap("prompts")
        yield prompted


def segment_batches(
    ctx: RoundContext, prompted: Iterable[tuple[ImageBatch, list[Probs], list[list[Prompts]]]]
) -> Iterator[SegmentedBatch]:
    """Batches with the segmenter's candidates, and the auxiliary model's probabilities where there is one."""
    for batch, probs, prompts in prompted:
        segmented = segment_prompts(ctx, batch, prompts)
        batch.embedded.clear()
        yield SegmentedBatch(batch, probs, predict_auxiliary(ctx, batch), *segmented)


def save_batches(ctx: RoundContext, workers: Pool, segmented: Iterable[SegmentedBatch]) -> None:
    """Gate, refine and save the batches, by threads; the time that this thread waits for them is shared out."""

    def finish(of: SegmentedBatch) -> tuple[int, dict[str, float]]:
        timer, objects = StageTimer(), (of.prompts, of.candidates)
        decisions = gate_batch(ctx, of.batch, of.probs, *objects, of.auxiliary_probs)
        timer.lap("gate")
        labels = refine_batch(ctx, of.batch, of.probs, *objects, decisions)
        timer.lap("refine")
        save_batch(ctx, of.batch, *objects, decisions, labels)
        timer.lap("store")
        return of.batch.batch_idx, timer.seconds

    task = ctx.task
    for batch_idx, spent in ahead(workers, finish, segmented, DEPTH):
        ctx.timer.share_lap(spent)
        task.progress.advance(min((batch_idx + 1) * task.mining_batch_size, len(task.unlabeled)))


def save_batch(
    ctx: RoundContext,
    batch: ImageBatch,
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    decisions: Sequence[Sequence[Decision]],
    labels: Sequence[PseudoLabel | None],
) -> None:
    """Save a mined batch, with the images that have a reviewer's verdict behind the others."""
    prompt_rows, rows = table_rows(batch.images, prompts, candidates, decisions, labels, batch.vetoed)
    by_id = {i: label for i, label in zip(batch.ids, labels, strict=True) if label is not None}
    more_rows, more_labels = reviewed_labels(ctx.task.review, batch.reviewed, ctx.signature, ctx.round_idx)
    written = prompt_rows, rows + more_rows, by_id | more_labels
    ctx.task.run.save_batch(ctx.round_idx, ctx.signature, batch.batch_idx, *written)
