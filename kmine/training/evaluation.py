"""What a round is worth on validation, and whether it is adopted."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.ops.metrics import case_metrics, summarise
from kmine.ops.statistics import is_fall, paired_change
from kmine.training.distributed import gather_shards, shard
from kmine.training.inference import infer
from kmine.training.task import Checkpoints, Task
from kmine.types import Metrics, RoundResult, Sample


def evaluate_round(
    task: Task,
    model: LocalModel,
    checkpoints: Checkpoints,
    *,
    round_idx: int,
    num_pseudo: int = 0,
    reference: RoundResult | None = None,
    seconds: dict[str, float] | None = None,
    method_dir: str = "",
) -> RoundResult:
    """Both checkpoints on validation, in the images' own frames; saved as the round's metrics.json.

    `reference` is the last adopted round: this one is adopted unless, image by image, its Dice fell by more than the
    tolerance and by more than noise (`kmine.ops.statistics.is_fall`).
    """
    path = task.run.round_dir(round_idx, method_dir) / "metrics.json"
    signature = sign(checkpoints.signature, num_pseudo, reference.metrics.dice if reference else None)
    saved = task.run.load_json(path, signature)
    if saved:
        return RoundResult.from_json(saved)
    began = time.perf_counter()
    context = {
        "num_classes": task.num_classes,
        "batch_size": task.cfg.infer.batch_size,
        "device": task.fabric.device,
        "fabric": task.fabric,
    }
    final = evaluate_checkpoint(task.val, model, checkpoints.final, **context)
    chosen = evaluate_checkpoint(task.val, model, checkpoints.best, **context)
    result = RoundResult(
        round_idx=round_idx,
        num_labeled=len(task.labeled),
        num_pseudo=num_pseudo,
        metrics=chosen,
        final_metrics=final,
        seconds={**(seconds or {}), "fit": checkpoints.seconds, "evaluate": time.perf_counter() - began},
        **_adoption(reference.metrics if reference else None, chosen, task.cfg.adopt_tolerance),
    )
    task.run.save_json(path, asdict(result), signature)
    task.fabric.barrier()
    return result


def _adoption(before: Metrics | None, after: Metrics, tolerance: float) -> dict[str, Any]:
    """Whether a round is adopted, why, and the paired change of its Dice: fields of its `RoundResult`."""
    if before is None:
        return {"adopted": True}
    old = {case.sample_id: case.dice for case in before.cases}
    change = paired_change([old[case.sample_id] for case in after.cases], [case.dice for case in after.cases])
    fell = is_fall(change, tolerance)
    return {
        "adopted": not fell,
        "reason": f"refused: fell by {-change.difference:.3f}" if fell else "adopted",
        "difference": change.difference,
        "difference_low": change.low,
        "difference_high": change.high,
    }


def evaluate_checkpoint(
    pool: Pool,
    model: LocalModel,
    weights: dict[str, Tensor],
    *,
    num_classes: int,
    batch_size: int,
    device: Any,
    fabric: Any = None,
) -> Metrics:
    """Metrics of the checkpoint `weights` on the images of `pool` (opened with masks), in their own frames.

    HD95 is in mm where the spacing of all of them is known, else in pixels throughout: a mean of both would be neither.
    The processes of `fabric` share the images.
    """
    model.load_state_dict(weights)
    predictions = infer(
        model,
        pool,
        shard(pool.ids, fabric) if fabric else pool.ids,
        batch_size=batch_size,
        tta="none",
        device=device,
    )
    samples = ((pool.sample(p.sample_id), p.mask) for p in predictions)
    if not pool.in_mm:
        samples = ((replace(sample, spacing=None), mask) for sample, mask in samples)
    metrics = compute_metrics(samples, num_classes)
    return summarise(gather_shards(metrics.cases, fabric)) if fabric else metrics


def compute_metrics(predictions: Iterable[tuple[Sample, NDArray[np.uint8]]], num_classes: int) -> Metrics:
    """Dice, IoU, HD95 and missed lesions per case, and their means; rules in `kmine.ops.metrics`.

    Args:
        predictions: pairs of a sample with its mask and the predicted (H, W) class ids in the sample's frame.
        num_classes: with background.
    """
    return summarise(case_metrics(s.sample_id, pred, _truth(s), num_classes, s.spacing) for s, pred in predictions)


def _truth(sample: Sample) -> NDArray[np.uint8]:
    if sample.mask is None:
        raise ValueError(f"evaluate: sample {sample.sample_id} was opened without its mask")
    return sample.mask
