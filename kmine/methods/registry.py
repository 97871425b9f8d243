"""The arms of a comparison: mining as the loop does it, and what it is compared with, by name.

Above `preparation`, because mining and self-training are a method and what comes before it: the same `mine()`, the gate
calibrated with whoever is asked, a promptable segmenter or nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from kmine.data.pool import Pool
from kmine.errors import unknown_name
from kmine.methods.self_training import self_training
from kmine.training.task import Task
from kmine.types import RoundResult

Method = Callable[[Task], Iterator[RoundResult]]
ORACLE = "oracle"


def prepare_and_mine(task: Task) -> Iterator[RoundResult]:
    """Knowledge mining after adaptation of the segmenter and calibration of the gate.

    The preparation is done when this returns; run.json then names the segmenter that mines. In a distributed launch
    the first process does it for all.
    """
    from kmine.methods.mining import mine
    from kmine.mining.adaptation.step import adapt_segmenter
    from kmine.mining.calibration.step import calibrate
    from kmine.training.distributed import rank_zero_first
    from kmine.training.model_setup import new_model
    from kmine.training.task import single_process
    from kmine.training.trainer import train

    fabric, base = task.fabric, task.segmenter
    if fabric.world_size > 1:
        train(task, new_model(task), round_idx=0)  # by all processes; the first one reads it below
    with rank_zero_first(fabric):
        prepared = replace(calibrate(adapt_segmenter(single_process(task)), base), fabric=fabric)
    if prepared.segmenter:
        task.run.update_run(segmenter=prepared.segmenter.name, segmenter_sha256=prepared.segmenter.signature)
    return mine(prepared)


def _supervised(task: Task) -> Iterator[RoundResult]:
    """See `kmine.methods.supervised`."""
    from kmine.methods.supervised import supervised as method

    return method(task)


def _mean_teacher(task: Task) -> Iterator[RoundResult]:
    """See `kmine.methods.mean_teacher`."""
    from kmine.methods.mean_teacher import mean_teacher as method

    return method(task)


def _fixmatch(task: Task) -> Iterator[RoundResult]:
    """See `kmine.methods.fixmatch`."""
    from kmine.methods.fixmatch import fixmatch as method

    return method(task)


METHODS: dict[str, Method] = {
    "supervised": _supervised,
    "self_training": self_training,
    "mean_teacher": _mean_teacher,
    "fixmatch": _fixmatch,
    "mining": prepare_and_mine,
}
"""By name, what needs no more than a task; its own libraries load when it is called. The oracle needs the truth."""
ROOT_METHODS = ("self_training", "mining")
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


def method_dir_of(name: str) -> str:
    """The folder within the run folder that holds a method's rounds; empty: the run folder itself."""
    return "" if name in ROOT_METHODS else name
