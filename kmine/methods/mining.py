"""Knowledge mining: the loop of the paper (arXiv 2503.06816), as read in docs/method.md.

The local model's predictions prompt the segmenter on the unlabeled images; what comes back is gated, refined, and
teaches the local model of the next round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from kmine.mining.candidates import (
    BATCH_SIZE,
    gate_batch,
    median_object_area,
    previous_masks,
    propose_candidates,
    refine_batch,
)
from kmine.mining.pseudo_labels import merge_reviewed, pseudo_labeled_pool, record_round_changes
from kmine.mining.round_changes import explain_empty_round
from kmine.mining.tables import decision_rows
from kmine.mining.threshold import round_signature, select_threshold_for_round
from kmine.training.distributed import rank_zero_first, shard
from kmine.training.evaluation import evaluate_round
from kmine.training.model_setup import new_model
from kmine.training.rounds import trained_auxiliary_model
from kmine.training.task import StageTimer, Task
from kmine.training.trainer import train
from kmine.types import RoundResult


def mine(task: Task) -> Iterator[RoundResult]:
    """Round 0 on the labels alone; then, `rounds` times: mine the unlabeled images, fit on labels + pseudo masks.

    Every round starts from the last adopted one. Stops early where a round finds no pseudo mask at all: that
    round has the metrics of the one before, and is not adopted. Stops, too, after two refused rounds in a row: the
    next would start from the same model once more.
    """
    cfg, progress = task.cfg, task.progress
    model = new_model(task)
    current = train(task, model, round_idx=0)
    adopted = evaluate_round(task, model, current, round_idx=0)
    yield adopted
    area_prior = median_object_area(task.labeled, task.num_classes)
    auxiliary_model, auxiliary_signature = trained_auxiliary_model(task) or (None, "")
    signatures: list[str] = []
    last_adopted = 0
    for round_idx in range(1, cfg.rounds + 1):
        signature, clock = round_signature(task, current, auxiliary_signature), StageTimer()
        model.load_state_dict(current.best)
        previous = previous_masks(task, round_idx)
        propose = partial(propose_candidates, task, model, auxiliary_model, previous, round_idx, clock)
        batches = list(task.run.pending_batches(round_idx, signature, task.unlabeled.ids, BATCH_SIZE))
        task.fabric.barrier()  # all have seen what there is to do before anyone does some of it
        with rank_zero_first(task.fabric):
            calibration = (
                select_threshold_for_round(task, propose, area_prior, round_idx, signature) if batches else None
            )
        progress.start(f"round {round_idx}: mining", len(task.unlabeled))
        for batch_idx, ids in shard(batches, task.fabric):
            batch = propose([i for i in ids if i not in task.review])  # images -> probs -> prompts -> candidates
            decisions = gate_batch(batch, area_prior, cfg, calibration)
            clock.lap("gate")
            pseudo = refine_batch(batch, decisions, cfg.refine)
            clock.lap("refine")
            tables, masks = decision_rows(batch.images, batch.prompts, batch.candidates, decisions, pseudo)
            task.run.save_batch(round_idx, signature, batch_idx, *merge_reviewed(task.review, ids, tables, masks))
            clock.lap("store")
            progress.advance(min((batch_idx + 1) * BATCH_SIZE, len(task.unlabeled)))
        task.fabric.barrier()
        signatures.append(signature)
        with rank_zero_first(task.fabric):
            rows = task.run.close_round(round_idx, signature, math.ceil(len(task.unlabeled) / BATCH_SIZE))
            record_round_changes(task, signatures, rows)
        clock.lap("changes")
        pseudo_pool = pseudo_labeled_pool(task, round_idx, rows)
        if not len(pseudo_pool):
            message = "no pseudo mask was kept, so there is nothing to learn from; stopping"
            progress.log(f"round {round_idx}: {message} ({explain_empty_round(rows)})")
            unchanged = {"metrics": adopted.metrics, "final_metrics": adopted.final_metrics, "seconds": clock.seconds}
            yield RoundResult(
                round_idx, len(task.labeled), 0, adopted=False, reason="refused: no pseudo mask", **unchanged
            )
            return
        pseudo_labels = {"pseudo": pseudo_pool, "pseudo_signature": signature}
        fitted = train(task, model, round_idx=round_idx, start=current, **pseudo_labels)
        context = {"num_pseudo": len(pseudo_pool), "reference": adopted, "seconds": clock.seconds}
        result = evaluate_round(task, model, fitted, round_idx=round_idx, **context)
        yield result
        if result.adopted:
            current, adopted, last_adopted = fitted, result, round_idx
        elif round_idx - last_adopted == 2:
            return
