"""The baselines: training on labels alone, for as many optimizer steps as mining has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kmine.config.sweep import LABELS_ONLY
from kmine.training.rounds import train_once, train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult, labels_only_dir

METHOD_DIR, ONCE_DIR = LABELS_ONLY


def supervised(task: Task) -> Iterator[RoundResult]:
    """Round 0 of mining, then `rounds` times `fit.round_steps` more steps on the same labels.

    Schedule, averaging, checkpoint selection and adoption rule are those of mining, so only the pseudo masks differ.
    CutMix mixes labeled images with one another.
    """
    return train_rounds(task, METHOD_DIR)


def supervised_once(task: Task) -> Iterator[RoundResult]:
    """One training on the labels alone, from the initial weights, with the steps of round 0 and of all rounds.

    One schedule is a stronger baseline than a chain of restarts. Its result has the number of the last round; without
    rounds it is round 0.
    """
    if task.cfg.rounds:
        yield train_once(task, task.cfg.rounds, round_idx=task.cfg.rounds, method_dir=ONCE_DIR)
    else:
        yield from supervised(task)


def labels_only(task: Task, name: str) -> Iterator[RoundResult]:
    """The supervised baseline with another network, unetpp or unet: same encoder, labels, steps and seed.

    All its rounds lie in the folder `labels_only_dir(name)`.
    """
    model, folder = task.cfg.model.with_architecture(name), labels_only_dir(name)
    own = replace(task, cfg=replace(task.cfg, model=model), auxiliary_model=None)
    return train_rounds(own, folder, first_dir=folder)
