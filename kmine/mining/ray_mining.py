"""A round's batches mined by workers on a Ray cluster.

Each worker has a copy of the round's models and writes its batches into the run folder, as the processes of a
distributed launch do, so all nodes see that folder and the data under the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kmine.errors import UserError
from kmine.io.ray_cluster import ray_cluster
from kmine.mining.context import RoundContext
from kmine.mining.pipeline import mine_batches
from kmine.training.distributed import SingleDevice
from kmine.training.task import StageTimer

INSTEAD = "use --backend local"
CHUNKS, LONGEST = 4, 16
"""Chunks of batches for each worker, so that a slow one is not waited for long; and most batches of a chunk."""
RESTARTS = 3
"""How often a worker begins anew on another node, and how often its chunk is mined again, as when a node is lost."""


class _Silent:
    """A `ProgressReporter` of a worker, which reports by its results."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None: ...


class Worker:
    """A process on a node, with a copy of the round; relative paths of the settings start at `folder`."""

    def __init__(self, ctx: RoundContext, folder: str) -> None:
        os.chdir(folder)
        if ctx.task.fabric.device.type == "cpu":
            torch.set_num_threads(1)
        self._ctx = ctx

    def mine(self, batches: Sequence[tuple[int, list[str]]]) -> tuple[int, dict[str, float]]:
        """Mine and save `batches` (number and sample ids); returns how many images, and the seconds by stage."""
        ctx = replace(self._ctx, pending=tuple(batches), timer=StageTimer())
        mine_batches(ctx)
        return sum(len(ids) for _, ids in batches), ctx.timer.seconds


def mine_on_ray(ctx: RoundContext) -> None:
    """Mine the pending batches of `ctx` by workers with one GPU each, or without GPUs with one CPU each.

    A batch that is saved stays, whatever becomes of the others.

    Raises:
        UserError: no ray or no cluster, bad data, or a worker failed more than `RESTARTS` times.
    """
    task, device = ctx.task, ctx.task.fabric.device
    if not ctx.pending:
        return
    with ray_cluster(task.cfg.address, INSTEAD) as ray:
        need = {"num_gpus": 1} if device.type == "cuda" else {"num_cpus": 1}
        most = max(1, int(ray.cluster_resources().get("GPU" if device.type == "cuda" else "CPU", 1)))
        chunks = chunks_of(ctx.pending, most)
        alone = replace(task, fabric=SingleDevice(device), progress=_Silent())
        shared = ray.put(replace(ctx, task=alone, pending=()))
        actor = ray.remote(**need, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
        workers = [actor.remote(shared, str(Path.cwd())) for _ in range(min(most, len(chunks)))]
        try:
            done = len(task.unlabeled) - sum(len(ids) for _, ids in ctx.pending)
            results = ray.util.ActorPool(workers).map_unordered(lambda worker, chunk: worker.mine.remote(chunk), chunks)
            for count, seconds in results:
                done += count
                ctx.timer.share_lap(seconds)
                task.progress.advance(done)
        except ray.exceptions.RayError as error:
            raise _cause(error) from error


def chunks_of(batches: Sequence[tuple[int, list[str]]], num_workers: int) -> list[Sequence[tuple[int, list[str]]]]:
    """The batches in their order, some for each of several calls of a worker."""
    length = min(max(1, len(batches) // (CHUNKS * num_workers)), LONGEST)
    return [batches[n : n + length] for n in range(0, len(batches), length)]


def _cause(error: Any) -> Exception:
    """The exception of a worker's code, or one line on what happened to the worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"backend ray: a worker was lost ({type(error).__name__}: {lines[0]}); what is mined is kept, and the same "
        "command goes on from there"
    )
