"""The arms of a comparison: mining as the loop does it, and what it is compared with, by name.

Above `preparation`, because mining and self-training are a method and what comes before it: the same `mine()`, the gate
calibrated with whoever is asked, a promptable segmenter or nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from kmine.data.pool import Pool
from kmine.records import RoundResult, unknown_name
from kmine.rounds.task import Task
from kmine.store import RunStore

Method = Callable[[Task, RunStore], Iterator[RoundResult]]
ORACLE = "oracle"


def mining(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """Knowledge mining with all that comes before: the segmenter adapted, the gate calibrated.

    run.json then names what really mines.
    """
    from kmine.methods.mining import mine
    from kmine.preparation.adaptation import adapt_segmenter
    from kmine.preparation.calibration import calibrate

    ready = calibrate(adapt_segmenter(task, store), task.segmenter, store)
    if ready.segmenter:
        store.update_run(segmenter=ready.segmenter.name, segmenter_sha256=ready.segmenter.signature)
    return mine(ready, store)


def self_training(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """Mining with an echo in the segmenter's place: the local model's own masks, by the same gate, rounds and training.

    A calibrated gate is calibrated with the echo. There is nothing to adapt, to propose or to ask a second time.
    """
    from kmine.methods.mining import mine
    from kmine.preparation.calibration import calibrate
    from kmine.segmenters.echo import Echo

    if not task.cfg.rounds:
        return mine(task, store)
    prompts = replace(task.cfg.prompts, source="local", passes=1)
    echo = Echo()
    task = replace(task, cfg=replace(task.cfg, prompts=prompts), segmenter=echo)
    return mine(calibrate(task, echo, store), store)


def supervised(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """See `kmine.methods.supervised`."""
    from kmine.methods.supervised import supervised as method

    return method(task, store)


def mean_teacher(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """See `kmine.methods.mean_teacher`."""
    from kmine.methods.mean_teacher import mean_teacher as method

    return method(task, store)


def fixmatch(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """See `kmine.methods.fixmatch`."""
    from kmine.methods.fixmatch import fixmatch as method

    return method(task, store)


METHODS: dict[str, Method] = {
    "supervised": supervised,
    "self_training": self_training,
    "mean_teacher": mean_teacher,
    "fixmatch": fixmatch,
    "mining": mining,
}
"""By name, what needs no more than a task; its own libraries load when it is called. The oracle needs the truth."""
IN_RUN_FOLDER = ("self_training", "mining")
"""Their rounds lie in the run folder itself, so each needs one of its own; the others' in the arm of their name."""


def method(name: str, truth: Pool | None = None) -> Method:
    """The method of that name, `oracle` included: it alone is handed `truth`, and refuses to go without.

    Args:
        name: a key of `METHODS`, or `oracle`.
        truth: the unlabeled images with their true masks, for the oracle.

    Raises:
        UserError: an unknown name.
        ValueError: the truth for another method than the oracle, or none for it.
    """
    if name != ORACLE and name not in METHODS:
        raise unknown_name("method", name, [*METHODS, ORACLE])
    if (name == ORACLE) != (truth is not None):
        raise ValueError(f"expected true masks for the oracle alone, got {'some' if truth else 'none'} for {name}")
    if name != ORACLE:
        return METHODS[name]
    from kmine.methods.oracle import oracle

    return partial(oracle, truth=truth)


def arm_of(name: str) -> str:
    """The folder within the run folder that holds a method's rounds; empty: the run folder itself."""
    return "" if name in IN_RUN_FOLDER else name
