"""A local model's training in a round, and the rounds of methods that only train.

A checkpoint is read back where it was made from the same, and resumed where it is half done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np

from kmine.config import FitConfig
from kmine.data.augment import Augment
from kmine.data.batches import Batches, ViewBatches
from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.ops.metrics import case_metrics, summarise
from kmine.seeding import derive_seed
from kmine.training.checkpoints import _read_trained, _save_state, _training_text
from kmine.training.distributed import gather_shards, shard
from kmine.training.fit import Consistency, fit
from kmine.training.inference import predict_resized
from kmine.training.task import Checkpoints, Task
from kmine.training.train_steps import FitState
from kmine.types import CaseMetrics


def train(
    task: Task,
    model: LocalModel,
    *,
    round_idx: int,
    start: Checkpoints | None = None,
    pseudo: Pool | None = None,
    pseudo_signature: str = "",
    consistency: Consistency | None = None,
    method_dir: str = "",
) -> Checkpoints:
    """Fit on the labels and what is given beside them; read back if that was done before, resumed if half done.

    Args:
        task: labels, validation, settings.
        store: where checkpoints go.
        model: overwritten with `start`'s weights, then trained in place.
        round_idx: 0 trains for `fit.steps`, later rounds for `fit.round_steps`.
        start: weights to continue from (its validation-selected checkpoint).
        pseudo: pool whose masks are the pseudo masks.
        pseudo_signature: of what made them.
        consistency: what to make of the unlabeled images, without pseudo masks.
        method_dir: folder of the comparison this belongs to; empty for the loop.
    """
    folder = task.run.round_dir(round_idx, method_dir)
    cfg, steps = _schedule(task.cfg.fit if pseudo else task.cfg.fit.labels_only(), round_idx)
    if consistency:
        cfg = replace(cfg, labeled_share=task.cfg.fit.labeled_share, ema_decay=consistency.ema_decay)
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("num_workers", "steps", "round_steps", "round_lr")}
    origin = start.signature if start else ""
    model_settings = [asdict(task.cfg.model), *([asdict(task.cfg.classifier)] if task.cfg.model.name == "sks" else [])]
    pseudo_inputs = (consistency.signature if consistency else pseudo_signature, pseudo.weights if pseudo else {})
    signature = sign(task.signature, model_settings, settings, steps, round_idx, origin, pseudo_inputs)
    done = _read_trained(task.run, folder, signature)
    if done:
        (folder / "fit_state.safetensors").unlink(missing_ok=True)  # left where a kill came just before its end
        return done
    if start:
        model.load_state_dict(start.best)
    began = time.perf_counter()
    title = f"round {round_idx}{' ' + method_dir if method_dir else ''}: training"
    task.progress.start(title, steps)
    saved = task.run.load_tensors(folder / "fit_state.safetensors", signature)
    # The weak views, seen in eval mode, would crowd out the images of validation that are worth remembering.
    with nullcontext() if consistency else model.caching_features(augmented=cfg.augment or cfg.cutmix > 0):
        result = fit(
            model,
            _batches(task, cfg, round_idx, pseudo, consistency),
            cfg,
            steps=steps,
            fabric=task.fabric,
            seed=derive_seed(task.cfg.seed, "fit", round_idx),
            validate=_validation_dice(task),
            resume=FitState.from_tensors(*saved) if saved else None,
            save=lambda state: _save_state(task.run, folder, state, signature),
            progress=lambda done, loss, dice: task.progress.advance(done, _training_text(loss, dice)),
            consistency_fn=consistency.consistency_fn if consistency else None,
        )
    seconds = time.perf_counter() - began
    task.run.save_tensors(folder / "model_final.safetensors", result.final, signature)
    # The chosen checkpoint comes last: it says that the training is done.
    meta = {"best_step": result.best_step, "history": result.history, "seconds": seconds}
    task.run.save_tensors(folder / "model.safetensors", result.best, signature, **meta)
    (folder / "fit_state.safetensors").unlink(missing_ok=True)
    task.fabric.barrier()  # so that no process reads before it is written
    return Checkpoints(signature, result.best, result.final, seconds)


def _validation_dice(task: Task) -> Callable[[LocalModel], float]:
    """Mean Dice over the validation images at training size: cheap enough to choose checkpoints by."""

    def validate(model: LocalModel) -> float:
        cases: list[CaseMetrics] = []
        local_ids = shard(task.val.ids, task.fabric)
        for first in range(0, len(local_ids), task.cfg.infer.batch_size):
            ids = local_ids[first : first + task.cfg.infer.batch_size]
            images = np.stack([task.val.image_resized(i) for i in ids])
            probs, _ = predict_resized(model, images, "none", task.fabric.device)
            for sample_id, pred in zip(ids, probs.argmax(axis=1).astype(np.uint8), strict=True):
                truth = task.val.mask_resized(sample_id)
                cases.append(case_metrics(sample_id, pred, truth, task.num_classes, with_hd95=False))
        return summarise(gather_shards(cases, task.fabric)).dice

    return validate


def _schedule(cfg: FitConfig, round_idx: int) -> tuple[FitConfig, int]:
    """Settings with this round's learning rate, and its optimizer steps."""
    return (cfg, cfg.steps) if round_idx == 0 else (replace(cfg, lr=cfg.round_lr), cfg.round_steps)


def _batches(
    task: Task, cfg: FitConfig, round_idx: int, pseudo: Pool | None, consistency: Consistency | None
) -> Batches:
    plain, strong = (Augment(task.cfg.data.size, cfg.augment, strong=strong) for strong in (False, True))
    settings = {name: getattr(cfg, name) for name in ("batch_size", "labeled_share", "cutmix")}
    settings |= {"seed": task.cfg.seed, "round_idx": round_idx}
    if consistency:
        view = strong if consistency.strong else plain
        return ViewBatches(task.labeled, task.unlabeled, plain, strong=view, view_cutmix=consistency.cutmix, **settings)
    settings["max_empty_share"] = cfg.max_empty_share
    return Batches(task.labeled, pseudo, plain, pseudo_augment=strong if cfg.strong_augment else None, **settings)
