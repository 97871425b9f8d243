"""A mining round around its stages: opening, and closing when all batches are saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from kmine.io.files import sign
from kmine.io.threads import ahead, thread_pool
from kmine.mining.candidates import median_object_area, previous_masks
from kmine.mining.context import RoundContext
from kmine.mining.crossfit import part_models
from kmine.mining.memory import memory_of
from kmine.mining.pseudo_labels import PseudoLabels
from kmine.mining.round_changes import MaskComparison, RoundChanges, compare_rounds, summary_line, warnings
from kmine.mining.threshold import round_signature, select_threshold
from kmine.models.base import LocalModel
from kmine.segmenters.embedding_cache import CachingSegmenter
from kmine.store.tables import DecisionRow
from kmine.training.checkpoints import Checkpoints
from kmine.training.distributed import rank_zero_first
from kmine.training.task import Task


def open_round(
    task: Task,
    model: LocalModel,
    student: Checkpoints,
    auxiliary: tuple[LocalModel, str] | None,
    round_idx: int,
    parts: Sequence[Checkpoints] = (),
) -> RoundContext:
    """Load the student's weights into `model`, find the batches left to mine, and select the gate's threshold.

    `student` are the checkpoints of the last adopted round, `parts` those of `train_parts` after it; `auxiliary` is the
    auxiliary model with the signature of its training, if there is one.
    """
    auxiliary_model, auxiliary_signature = auxiliary or (None, "")
    signature = round_signature(task, student, auxiliary_signature, parts)
    model.load_state_dict(student.best)
    pending = tuple(task.run.pending_batches(round_idx, signature, task.unlabeled.ids, task.mining_batch_size))
    area_prior = median_object_area(task.labeled, task.num_classes)
    ctx = RoundContext(task, model, auxiliary_model, task.segmenter, task.unlabeled, area_prior, round_idx, signature)
    ctx = replace(ctx, previous=previous_masks(task, round_idx), pending=pending, memory=memory_of(task, task.labeled))
    ctx = replace(ctx, parts=part_models(task, student, parts)) if pending else ctx
    if seconds := task.run.training_seconds(f"part_*/round_{round_idx - 1:02}"):
        ctx.timer.seconds["parts"] = seconds
    task.fabric.barrier()  # every process has read what is pending before one of them saves a batch
    with rank_zero_first(task.fabric):
        ctx = replace(ctx, calibration=select_threshold(ctx)) if pending else ctx
    if pending and isinstance(task.segmenter, CachingSegmenter):
        task.progress.log(task.segmenter.reserve([task.unlabeled.unread(i) for i in task.unlabeled.ids]))
    task.progress.start(f"round {round_idx}: mining", len(task.unlabeled))
    return ctx


def close_round(ctx: RoundContext) -> PseudoLabels:
    """Join the batches of all processes into the round's tables, record what changed, and collect the pseudo-labels."""
    task, round_idx, signature = ctx.task, ctx.round_idx, ctx.signature
    task.fabric.barrier()
    num_batches = math.ceil(len(task.unlabeled) / task.mining_batch_size)
    with rank_zero_first(task.fabric):
        rows = task.run.close_round(round_idx, signature, num_batches)
        record_round_changes(task, round_idx, rows)
    log_full_images(task, round_idx, rows)
    ctx.timer.lap("changes")
    labels = PseudoLabels(task, round_idx, signature, rows, ctx.timer.seconds)
    if not labels:
        task.progress.log(f"round {round_idx}: no pseudo mask was kept, so the loop stops ({labels.why_empty})")
    return labels


def log_full_images(task: Task, round_idx: int, rows: Sequence[DecisionRow]) -> None:
    """Log in how many images `prompts.max_objects` may have left objects out."""
    most = task.cfg.prompts.max_objects
    if most is None:
        return
    objects = groupby((row for row in rows if row.is_object), key=lambda row: row.sample_id)
    by_image = (Counter(row.class_id for row in own) for _, own in objects)
    if full := sum(max(counts.values()) >= most for counts in by_image):
        task.progress.log(
            f"round {round_idx}: {full} of {len(task.unlabeled)} images have {most} objects of a class or more, of "
            "which the largest were prompted; raise --prompts.max_objects if so many are real"
        )


def record_round_changes(task: Task, round_idx: int, rows: Sequence[DecisionRow]) -> RoundChanges:
    """Save what a closed round changed as its changes.json, or read it back, and log a summary.

    `rows` are its decisions; pseudo masks of this round and of the one before are compared image by image.
    """
    run = task.run
    paths = [run.round_dir(n) / "changes.json" for n in range(1, round_idx + 1)]
    round_signatures = [run.round_signature(n) for n in range(1, round_idx + 1)]
    signatures = [sign("changes", task.signature, round_signatures[:n]) for n in range(1, round_idx + 1)]
    saved = [run.load_json(*of_round) for of_round in zip(paths, signatures, strict=True)]
    changes = RoundChanges.from_json(saved[-1]) if saved[-1] else None
    if changes is None:
        earlier = [RoundChanges.from_json(value).pseudo_labeled for value in saved[:-1] if value]
        assert len(earlier) == round_idx - 1, "each earlier round has saved its changes"
        changes = compare_rounds(
            _mask_comparisons(task, round_idx, rows, earlier[-1] if earlier else frozenset()),
            (task.labeled.mask_resized(i) for i in task.labeled.ids),
            earlier,
            num_unlabeled=len(task.unlabeled),
            num_classes=task.num_classes,
        )
        run.save_json(paths[-1], changes.to_json(), signatures[-1])
    names = task.run.run().get("class_names", ())
    task.progress.log(f"round {round_idx}: {summary_line(changes, names)}")
    for problem, cure in warnings(changes, names):
        task.progress.log(f"round {round_idx}: warning: {problem}; {cure}")
    return changes


def _mask_comparisons(
    task: Task, round_idx: int, rows: Sequence[DecisionRow], previous_ids: frozenset[str]
) -> Iterator[MaskComparison]:
    """The pseudo-labeled images of a round, a few at a time; `previous_ids` have a pseudo mask of the round before."""

    def read(of_image: Sequence[DecisionRow]) -> MaskComparison:
        sample_id = of_image[0].sample_id
        previous = task.pseudo_mask(round_idx - 1, sample_id) if sample_id in previous_ids else None
        return MaskComparison.from_rows(of_image, task.pseudo_mask(round_idx, sample_id), previous)

    groups = groupby((row for row in rows if row.in_training), key=lambda row: row.sample_id)
    with thread_pool() as readers:
        yield from ahead(readers, read, (list(group) for _, group in groups), depth=8)
