"""Knowledge mining: the loop of the paper (arXiv 2503.06816), as read in docs/method.md.

The local model's predictions prompt the segmenter on the unlabeled images; what comes back is gated, refined, and
teaches the local model of the next round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from kmine.mining.candidates import (
    CHUNK,
    answered_before,
    ask_about_images,
    gate_all,
    object_areas,
    refine_all,
)
from kmine.mining.pseudo_labels import heed_judged, note_changes, trainable
from kmine.mining.round_changes import why_none
from kmine.mining.tables import rows_of
from kmine.mining.threshold import mining_signature, settle
from kmine.store.run_folder import RunStore
from kmine.training.distributed import every_nth, leader_first
from kmine.training.evaluation import score
from kmine.training.model_setup import new_model
from kmine.training.rounds import trained_witness
from kmine.training.task import Clock, Task
from kmine.training.trainer import train
from kmine.types import RoundResult


def mine(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """Round 0 on the labels alone; then, `rounds` times: mine the unlabeled images, fit on labels + pseudo masks.

    Every round starts from the last adopted one. Stops early where a round finds no pseudo mask at all: that
    round has the metrics of the one before, and is not adopted. Stops, too, after two refused rounds in a row: the
    next would start from the same model once more.
    """
    cfg, watcher = task.cfg, task.watcher
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    labeled_area = object_areas(task.labeled, task.num_classes)
    witness, witness_signature = trained_witness(task, store) or (None, "")
    mined_by: list[str] = []
    last_adopted = 0
    for round_idx in range(1, cfg.rounds + 1):
        made_by, clock = mining_signature(task, current, witness_signature), Clock()
        model.load_state_dict(current.best)
        known = answered_before(task, store, round_idx)
        asking = partial(ask_about_images, task, model, witness, known, round_idx, clock)
        parts = list(store.pending_batches(round_idx, made_by, task.unlabeled.ids, CHUNK))
        task.fabric.barrier()  # all have seen what there is to do before anyone does some of it
        with leader_first(task.fabric):
            calibration = settle(task, store, asking, labeled_area, round_idx, made_by) if parts else None
        watcher.start(f"round {round_idx}: mining", len(task.unlabeled))
        for part, ids in every_nth(parts, task.fabric):
            asked = asking([i for i in ids if i not in task.judged])  # images -> probs -> prompts -> candidates
            decisions = gate_all(asked, labeled_area, cfg, calibration)
            clock.lap("gate")
            pseudo = refine_all(asked, decisions, cfg.refine)
            clock.lap("refine")
            tables, masks = rows_of(asked.images, asked.prompts, asked.candidates, decisions, pseudo)
            store.save_batch(round_idx, made_by, part, *heed_judged(task.judged, ids, tables, masks))
            clock.lap("store")
            watcher.advance(min((part + 1) * CHUNK, len(task.unlabeled)))
        task.fabric.barrier()
        mined_by.append(made_by)
        with leader_first(task.fabric):
            rows = store.close_round(round_idx, made_by, math.ceil(len(task.unlabeled) / CHUNK))
            note_changes(task, store, mined_by, rows)
        clock.lap("changes")
        pseudo_pool = trainable(task, store, round_idx, rows)
        if not len(pseudo_pool):
            nothing = "no pseudo mask was kept, so there is nothing to learn from; stopping"
            watcher.say(f"round {round_idx}: {nothing} ({why_none(rows)})")
            same = {"metrics": adopted.metrics, "final_metrics": adopted.final_metrics, "seconds": clock.seconds}
            yield RoundResult(round_idx, len(task.labeled), 0, adopted=False, reason="refused: no pseudo mask", **same)
            return
        taught = {"pseudo": pseudo_pool, "pseudo_signature": made_by}
        fitted = train(task, store, model, round_idx=round_idx, start=current, **taught)
        about = {"num_pseudo": len(pseudo_pool), "before": adopted, "seconds": clock.seconds}
        result = score(task, store, model, fitted, round_idx=round_idx, **about)
        yield result
        if result.adopted:
            current, adopted, last_adopted = fitted, result, round_idx
        elif round_idx - last_adopted == 2:
            return
