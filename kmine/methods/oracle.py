"""The upper bound: mining if every pseudo mask were the true mask. Not a method, as it reads withheld masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "oracle"
REASON_PREFIX = "true masks of the unlabeled images; "


def oracle(task: Task, truth: Pool) -> Iterator[RoundResult]:
    """The rounds of mining with true masks as pseudo masks. **Reads masks that are withheld from every other method.**

    The reason of every result after round 0 says so. `truth` are unlabeled images, all or some, opened with their true
    masks for this method alone; the unlabeled pool of `task` withholds them, as for every method.

    Raises:
        WithheldMaskError: `truth` withholds its masks.
        ValueError: it is empty, or has images of another split.
    """
    others = set(truth.ids) - set(task.unlabeled.ids)
    if others or not len(truth):
        raise ValueError(f"expected true masks of unlabeled images, got {len(truth)}, {len(others)} of another split")
    truth.mask_resized(truth.ids[0])  # a pool without masks fails now, not after round 0
    whole = truth.ids == task.unlabeled.ids
    signature = f"truth of {len(truth)}" if whole else sign("truth", truth.ids)
    rounds = train_rounds(task, METHOD_DIR, lambda _: {"pseudo": truth, "pseudo_signature": signature})
    return (replace(r, reason=REASON_PREFIX + r.reason) if r.round_idx else r for r in rounds)
