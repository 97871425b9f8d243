"""Methods by name. Importing this module loads no torch: a method's libraries load when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from kmine.config.sweep import METHODS, MINING, ORACLE
from kmine.types import RoundResult

if TYPE_CHECKING:
    from kmine.data.pool import Pool
    from kmine.training.task import Task

Method = Callable[["Task"], Iterator[RoundResult]]
ROOT_METHODS = ("self_training", MINING)
"""Methods whose rounds lie in the run folder itself; those of another method lie in a folder of its name."""


def register_method(name: str, method: Method) -> None:
    """Add a method for sweeps of this process, or replace an added one; packages add theirs by an entry point.

    `method(task)` yields the result of each round as it is done, round 0 first. Rounds after it belong into folders
    `task.run.round_dir(round_idx, name)`, as `kmine.training.rounds.train_rounds` writes them. The task has no
    segmenter, and its unlabeled pool withholds masks.

    Raises:
        UserError: an empty name, or one of kmine's own.
    """
    METHODS.register(name, method)


def method(name: str, truth: Pool | None = None) -> Method:
    """The method called `name`, one of `METHODS`; the oracle gets `truth`, unlabeled images with their true masks.

    Raises:
        UserError: an unknown name.
        ValueError: `truth` for another method than the oracle, or none for the oracle.
    """
    found = METHODS.get(name)
    if (name == ORACLE) != (truth is not None):
        raise ValueError(f"expected true masks for the oracle alone, got {'some' if truth else 'none'} for {name}")
    if isinstance(found, str):
        module, _, function = found.partition(":")
        found = getattr(importlib.import_module(module), function)
    return found if truth is None else partial(found, truth=truth)


def method_dir_of(name: str) -> str:
    """The folder within the run folder that holds a method's rounds; empty for the run folder itself."""
    return "" if name in ROOT_METHODS else name
