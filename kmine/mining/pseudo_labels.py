"""From the gate's decisions to the images that teach: which they are, what they weigh, what changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.pool import Pool
from kmine.feedback.verdict_effects import VerdictEffects, read_mask
from kmine.io.files import sign
from kmine.mining.round_changes import (
    PseudoLabel,
    RoundChanges,
    compare_rounds,
    pseudo_label_of,
    summary_line,
    warnings,
)
from kmine.mining.tables import LESION_FREE, reviewed_rows
from kmine.store.run_folder import RunFolder
from kmine.training.task import Task

Row = dict[str, Any]


def merge_reviewed(
    review: VerdictEffects, ids: Sequence[str], tables: dict[str, list[Row]], masks: dict[str, NDArray[np.uint8]]
) -> tuple[dict[str, list[Row]], dict[str, NDArray[np.uint8]]]:
    """A chunk's rows and pseudo masks with those of the images among `ids` that a person judged: nobody was asked.

    `masks`, by sample: (H, W) uint8 class ids in the image's own frame, 255 = ignore; so are those that come back.
    """
    accepted = [i for i in ids if i in review.accepted]
    rejected = [i for i in ids if i in review.rejected]
    rows = {**tables, "decisions": tables["decisions"] + reviewed_rows(rejected, accepted)}
    return rows, masks | {i: read_mask(review.accepted[i]) for i in accepted}


def pseudo_labeled_pool(task: Task, round_idx: int, rows: Sequence[Row]) -> Pool:
    """The unlabeled images that have a pseudo mask, with that mask, its weight, and whether it is known to be empty."""
    kept = [row for row in rows if row["in_training"]]
    ids = {row["sample_id"] for row in kept}
    return task.unlabeled.with_masks(
        [i for i in task.unlabeled.ids if i in ids],
        lambda sample_id: task.run.pseudo_mask(round_idx, sample_id),
        weights=pseudo_label_weights(kept) if task.cfg.fit.pseudo_weight == "estimated" else None,
        empty=[row["sample_id"] for row in kept if row["reason"] == LESION_FREE],
    )


def pseudo_label_weights(rows: Sequence[Row]) -> dict[str, float]:
    """By image, the mean estimated Dice of its kept objects, from rows of decisions; without any, it is left out."""
    estimates: dict[str, list[float]] = {}
    for row in rows:
        value = row["estimated_dice"] if row["kept"] and row["object_idx"] >= 0 else None
        if value is not None and not math.isnan(value):
            estimates.setdefault(row["sample_id"], []).append(min(max(value, 0.0), 1.0))
    return {sample_id: float(np.mean(values)) for sample_id, values in estimates.items()}


def record_round_changes(task: Task, round_signatures: Sequence[str], rows: Sequence[Row]) -> RoundChanges:
    """What the last round of `round_signatures` (signatures of rounds 1, 2, ...) changed: saved as changes.json, and said.

    `rows` are its decisions. It is told from the pseudo masks of this round and of the one before, image by image.
    """

    def load(round_idx: int) -> RoundChanges | None:
        value = task.run.load_json(paths[round_idx - 1], signatures[round_idx - 1])
        return RoundChanges.from_json(value) if value else None

    last = len(round_signatures)
    paths = [task.run.round_dir(n) / "changes.json" for n in range(1, last + 1)]
    signatures = [sign("changes", task.signature, round_signatures[:n]) for n in range(1, last + 1)]
    changes = load(last)
    if changes is None:
        earlier = [previous.pseudo_labeled for n in range(1, last) if (previous := load(n))]
        assert len(earlier) == last - 1, "each round before has saved its own"
        changes = compare_rounds(
            iter_pseudo_labels(task.run, last, rows, earlier[-1] if earlier else frozenset()),
            (task.labeled.mask_resized(i) for i in task.labeled.ids),
            earlier,
            num_unlabeled=len(task.unlabeled),
            num_classes=task.num_classes,
        )
        task.run.save_json(paths[-1], changes.to_json(), signatures[-1])
    task.progress.log(f"round {last}: {summary_line(changes)}")
    for warning in warnings(changes):
        task.progress.log(f"round {last}: warning: {warning}")
    return changes


def iter_pseudo_labels(
    store: RunFolder, round_idx: int, rows: Sequence[Row], previous_ids: frozenset[str]
) -> Iterator[PseudoLabel]:
    """The images of a round that teach, one at a time; `previous_ids`: those that have a pseudo mask of the round before."""
    kept = (row for row in rows if row["in_training"])
    for sample_id, group in groupby(kept, key=lambda row: row["sample_id"]):
        previous = store.pseudo_mask(round_idx - 1, sample_id) if sample_id in previous_ids else None
        yield pseudo_label_of(list(group), store.pseudo_mask(round_idx, sample_id), previous)
