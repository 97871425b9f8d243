"""Metrics on validation and test images, and whether a round is adopted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from kmine.config import LoopConfig
from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.io.threads import ahead, thread_pool
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.ops.metrics import case_metrics, of_one_kind, summarise
from kmine.ops.statistics import SMALL_SPLIT, paired_change
from kmine.store.history import LOOP_ARM, track
from kmine.training.checkpoints import Checkpoints
from kmine.training.distributed import DeviceContext, SingleDevice, gather_shards, shard
from kmine.training.inference import infer, predict_resized, resized_batches
from kmine.training.task import Task
from kmine.types import CaseMetrics, Metrics, Probs, RoundResult, most_probable


def evaluate_round(
    task: Task,
    model: LocalModel,
    checkpoints: Checkpoints,
    *,
    round_idx: int,
    reference: RoundResult | None = None,
    method_dir: str = "",
    **known: Any,
) -> RoundResult:
    """Evaluate both checkpoints on validation and decide on adoption; written to metrics.json, or read back from it.

    The round is adopted if its score, paired by image with `reference`, the last adopted round, may have fallen by at
    most `adopt_tolerance`: that is the lower end of the 80 % interval over independent images (own choice). With fewer
    than `SMALL_SPLIT` of these the mean decides, which must not be below 0. A retrained model is adopted if its mean
    score is not below that of `reference`. Silence on a clean image counts 1 and a false alarm 0.
    `known` are `num_pseudo`, `seconds` of the stages so far, and `retrained` of the result.
    Overwrites the weights of `model`.
    """
    path = task.run.round_dir(round_idx, method_dir) / "metrics.json"
    known = {"num_pseudo": 0, "seconds": {}, **known}
    signature = sign(checkpoints.signature, known["num_pseudo"], reference.metrics.dice if reference else None)
    saved = task.run.load_json(path, signature)
    if saved:
        return RoundResult.from_json(saved)
    began = time.perf_counter()
    options = {"batch_size": task.cfg.infer.batch_size, "fabric": task.fabric}
    final = best = evaluate_checkpoint(task.val, model, checkpoints.final, **options)
    if not checkpoints.is_last_used:
        best = evaluate_checkpoint(task.val, model, checkpoints.best, **options)
    seconds = {**known["seconds"], "fit": checkpoints.seconds, "evaluate": time.perf_counter() - began}
    result = RoundResult(
        round_idx=round_idx,
        num_labeled=len(task.labeled),
        metrics=best,
        final_metrics=final,
        adopted=True,
        **known | {"seconds": seconds},
    )
    if reference:
        result = _compare_to(reference, result, task.val.group_of, task.cfg.adopt_tolerance)
    task.run.save_json(path, asdict(result), signature)
    arm = method_dir or LOOP_ARM
    track(task.run, {f"{arm}/dice": best.dice, f"{arm}/iou": best.iou}, round_idx)
    task.fabric.barrier()
    return result


def _compare_to(
    reference: RoundResult, result: RoundResult, group_of: Callable[[str], str], tolerance: float
) -> RoundResult:
    """`result` with the paired change of its scores since `reference`, and whether it is adopted."""
    old, new = of_one_kind(reference.metrics, result.metrics)
    before = {case.sample_id: case.score for case in old.cases}
    groups = [group_of(case.sample_id) for case in new.cases]
    scores = [before[case.sample_id] for case in new.cases], [case.score for case in new.cases]
    change = paired_change(*scores, groups=groups, confidence=0.8)
    behind, why = reference.metrics.score - result.metrics.score, ""
    if result.retrained:
        why = f"{behind:.3f} below round {reference.round_idx}" if behind > 0 else ""
    elif len(set(groups)) < SMALL_SPLIT:
        why = f"fell by {-change.difference:.3f}" if change.difference < 0 else ""
    elif change.low < -tolerance:
        why = f"may have fallen by {-change.low:.3f}"
    return replace(
        result,
        adopted=not why,
        reason=f"refused: {why}" if why else "adopted",
        difference=change.difference,
        difference_low=change.low,
        difference_high=change.high,
    )


def evaluate_checkpoint(
    pool: Pool, model: LocalModel, weights: dict[str, Tensor], *, batch_size: int, fabric: DeviceContext
) -> Metrics:
    """Metrics of a checkpoint on the images of `pool`, in their own frames.

    HD95 is in mm if the spacing of all images is known, else in pixels for all: the mean of both would have no unit.
    `weights` are loaded into `model`, which is on the device of `fabric`. The processes of `fabric` share the images.
    """
    model.load_state_dict(weights)
    ids = shard(pool.ids, fabric)
    predictions = infer(model, pool, ids, batch_size=batch_size, tta="none", device=fabric.device)

    def case(probs: Probs) -> CaseMetrics:
        mask, spacing = pool.mask_native(probs.sample_id), pool.spacing(probs.sample_id) if in_mm else None
        return case_metrics(probs.sample_id, probs.mask, mask, model.num_classes, spacing)

    in_mm = pool.in_mm
    with thread_pool() as workers:  # beside the network
        return summarise(gather_shards(list(ahead(workers, case, predictions, depth=8)), fabric))


def validation_scores(task: Task, model: LocalModel) -> list[float]:
    """`CaseMetrics.score` of each validation image at training size: cheap scores to choose checkpoints by."""
    cases: list[CaseMetrics] = []
    for ids, images in resized_batches(task.val, shard(task.val.ids, task.fabric), task.cfg.infer.batch_size):
        probs, _ = predict_resized(model, images, "none", task.fabric.device)
        for sample_id, pred in zip(ids, most_probable(probs), strict=True):
            truth = task.val.mask_resized(sample_id)
            cases.append(case_metrics(sample_id, pred, truth, task.num_classes, with_hd95=False))
    return [case.score for case in gather_shards(cases, task.fabric)]


@dataclass(frozen=True)
class Evaluator:
    """Test split of a run with its masks, and its local model, into which any checkpoint is loaded."""

    pool: Pool
    model: LocalModel
    batch_size: int
    fabric: SingleDevice

    def evaluate(self, weights: Mapping[str, Tensor]) -> Metrics:
        """Metrics of a checkpoint, a case an image, in the frames of the images."""
        return evaluate_checkpoint(self.pool, self.model, weights, batch_size=self.batch_size, fabric=self.fabric)

    def with_architecture(self, cfg: LoopConfig, name: str) -> Evaluator:
        """The same images for the baseline model `name` of a run of `cfg`."""
        model = cfg.model.split()[0].with_architecture(name)
        network = build_model(model, self.model.num_classes, cfg.seed, pretrained=False)
        return replace(self, model=network.with_patch(cfg.data.patch).to(self.fabric.device))
