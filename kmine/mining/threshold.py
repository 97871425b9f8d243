"""The gate's threshold of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import threshold_by_estimates
from kmine.mining.candidates import (
    CHUNK,
    Asked,
    gate_all,
)
from kmine.ops.calibrator import Calibration, settled
from kmine.seeding import derive_seed
from kmine.store.run_folder import RunStore
from kmine.training.task import Task, Trained
from kmine.types import ESTIMATED

PILOT = 64
"""Unlabeled images that settle a round's threshold where the labels promise nothing: a few dozen estimates will do."""


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
