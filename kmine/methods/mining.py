"""Knowledge mining: the loop of the paper (arXiv 2503.06816), as read in docs/method.md.

The local model's predictions prompt the segmenter on the unlabeled images; what comes back is gated, refined, and
teaches the local model of the next round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from kmine.calibrator import Calibration, settled
from kmine.models.together import every_nth, leader_first
from kmine.records import ESTIMATED, RoundResult, derive_seed
from kmine.rounds.asking import CHUNK, Asked, answered_before, ask_about_images, gate_all, object_areas, refine_all
from kmine.rounds.scoring import score
from kmine.rounds.task import Clock, Task, Trained
from kmine.rounds.teaching import heed_judged, note_changes, trainable
from kmine.rounds.training import new_model, train, trained_witness
from kmine.stages.calibrate import threshold_by_estimates
from kmine.stages.changes import why_none
from kmine.stages.tabulate import rows_of
from kmine.store import RunStore, sign

PILOT = 64
"""Unlabeled images that settle a round's threshold where the labels promise nothing: a few dozen estimates will do."""


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
        parts = list(store.unmined(round_idx, made_by, task.unlabeled.ids, CHUNK))
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
            store.save_mined(round_idx, made_by, part, *heed_judged(task.judged, ids, tables, masks))
            clock.lap("store")
            watcher.advance(min((part + 1) * CHUNK, len(task.unlabeled)))
        task.fabric.barrier()
        mined_by.append(made_by)
        with leader_first(task.fabric):
            rows = store.finish_mining(round_idx, made_by, math.ceil(len(task.unlabeled) / CHUNK))
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


def settle(
    task: Task,
    store: RunStore,
    asking: Callable[[Sequence[str]], Asked],
    labeled_area: dict[int, float],
    round_idx: int,
    made_by: str,
) -> Calibration | None:
    """What the gate goes by in this round.

    Where the labels promise the target at a threshold, that one holds. Where they are too few for it, so many masks
    are kept that their mean estimate reaches the target, seen on at most `PILOT` unlabeled images.
    """
    given = task.calibration
    if given is None or given.promise.kept:
        return given
    path, signature = store.round_dir(round_idx) / "threshold.json", sign("threshold", PILOT, made_by)
    about = store.load_json(path, signature)
    if about is None:
        open_ids = [i for i in task.unlabeled.ids if i not in task.judged]
        order = np.random.default_rng(derive_seed(task.cfg.seed, round_idx, "pilot")).permutation(len(open_ids))
        ids = [open_ids[n] for n in sorted(order[:PILOT])]
        task.watcher.start(f"round {round_idx}: settling the gate", len(ids))
        estimates: list[float] = []
        for first in range(0, len(ids), CHUNK):
            decisions = gate_all(asking(ids[first : first + CHUNK]), labeled_area, task.cfg, given)
            estimates += [d.estimated_dice for some in decisions for d in some if d.reason in ESTIMATED]
            task.watcher.advance(min(first + CHUNK, len(ids)))
        found = threshold_by_estimates(estimates, task.cfg.gate.target_dice, given.promise.threshold)
        about = {**found._asdict(), "target": task.cfg.gate.target_dice, "num_images": len(ids)}
        store.save_json(path, about, signature)
    task.watcher.say(f"round {round_idx}: {settled(about)}")
    return replace(given, promise=replace(given.promise, threshold=about["threshold"]))


def mining_signature(task: Task, current: Trained, witness: str = "") -> str:
    """What the pseudo masks of a round are made from: model, segmenter, settings."""
    cfg = task.cfg
    settings = [asdict(part) for part in (cfg.infer, cfg.prompts, cfg.gate, cfg.refine)]
    gate_by = (task.calibration.to_json(), PILOT) if task.calibration else None
    judged = [task.judged.signature] if task.judged.signature else []
    return sign(current.signature, task.segmenter.signature, settings, gate_by, witness, *judged)
