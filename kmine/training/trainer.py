"""Training of the local model in one round: read back if finished, resumed if interrupted."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kmine.config import FitConfig
from kmine.data.augment import Augment, symmetry_of
from kmine.data.batches import Batches, BatchPlan, ViewBatches
from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.ops.seeding import derive_seed
from kmine.store.history import record_history
from kmine.store.settings import signed, signed_sections
from kmine.training.checkpoints import Checkpointer, Checkpoints
from kmine.training.distributed import Fabric
from kmine.training.evaluation import validation_scores
from kmine.training.fit import Consistency, fit
from kmine.training.task import Task, auto_dice
from kmine.training.train_steps import Callbacks, show_progress
from kmine.training.veto import choose_vetoes, clear_veto


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
    """Train on the labels and, if given, on pseudo masks or unlabeled images.

    Args:
        task: labels, validation, settings, run folder.
        model: loaded with the weights of `start`, then trained in place.
        round_idx: 0 trains for `fit.steps`, later rounds for `fit.round_steps`.
        start: checkpoints to start from; the best one is used.
        pseudo: pool whose masks are the pseudo masks.
        pseudo_signature: of everything these depend on.
        consistency: training on unlabeled images without pseudo masks.
        method_dir: folder of a compared method; empty for the loop.
    """
    clean = None if pseudo or consistency else clean_images(task)
    cfg = _round_config(task, round_idx, pseudo, consistency)
    # No clean image shall be drawn more often than a labeled one.
    share = min(cfg.clean_share, len(clean) / (len(clean) + len(task.labeled))) if clean else 0.0
    cfg = replace(cfg, clean_share=share)
    pseudo_inputs = (consistency.signature if consistency else pseudo_signature, pseudo.weights if pseudo else {})
    signature = _signature(task, cfg, round_idx, start, pseudo_inputs)
    checkpointer = Checkpointer(task.run, task.run.round_dir(round_idx, method_dir), signature)
    record = partial(record_history, task.run, method_dir, round_idx)
    if finished := checkpointer.load():
        record(finished.history, finished.clock)
        return finished
    state = checkpointer.load_state()
    if start:
        model.load_state_dict(start.best)
    elif state is None:
        model.require_weights()
    clear_veto(model)
    began = time.perf_counter()
    task.progress.start(f"round {round_idx}{' ' + method_dir if method_dir else ''}: training", cfg.steps)
    progress = show_progress(task.progress, "score")
    callbacks = Callbacks(
        partial(validation_scores, task), checkpointer.save_state, checkpointer.SAVE_EVERY_S, progress, record=record
    )
    # The weak views pass the model in eval mode and would fill the cache in place of the validation images.
    with nullcontext() if consistency else model.caching_features(augmented=cfg.augment or cfg.cutmix > 0):
        result = fit(
            model,
            training_batches(task, cfg, round_idx, clean or pseudo, consistency),
            cfg,
            fabric=cast(Fabric, task.fabric),
            seed=derive_seed(task.cfg.seed, "fit", round_idx),
            callbacks=callbacks,
            resume=state,
            consistency_fn=consistency.consistency_fn if consistency else None,
        )
    if result.has_diverged:
        task.progress.log(
            f"round {round_idx}: the score on validation images fell after step {result.best_step}, so the weights of "
            "that step are used; a lower fit.lr may help"
        )
    result = choose_vetoes(task, model, result, checkpointer)
    checkpoints = checkpointer.save(result, time.perf_counter() - began)
    task.fabric.barrier()  # no process reads before the files are written
    return checkpoints


def clean_images(task: Task) -> Pool | None:
    """Unlabeled images known to be lesion-free, where lesions are all there is to find, with empty masks.

    Those whose mask a reviewer rejected are left out. None without any, or where `fit.clean_share` gives them no place.
    No mask is read.
    """
    unlabeled, cfg = task.unlabeled, task.cfg.fit
    if task.num_classes != 2 or not round(cfg.clean_share * cfg.batch_size):
        return None
    ids = [i for i in unlabeled.ids if unlabeled.image_label(i) == 0 and i not in task.review.rejected]
    if not ids:
        return None
    return unlabeled.with_masks(ids, partial(_empty_mask, unlabeled), empty=ids)


def _empty_mask(pool: Pool, sample_id: str) -> NDArray[np.uint8]:
    return np.zeros(pool.native_shape(sample_id), np.uint8)


def _round_config(task: Task, round_idx: int, pseudo: Pool | None, consistency: Consistency | None) -> FitConfig:
    """Training settings with this round's learning rate and steps; those without effect have their default values."""
    cfg = task.cfg.fit
    round_cfg = cfg if pseudo else cfg.labels_only()
    if cfg.dice == "auto":
        round_cfg = replace(round_cfg, dice=task.dice or auto_dice(task.labeled))
    if consistency:
        round_cfg = replace(round_cfg, labeled_share=cfg.labeled_share, ema_decay=consistency.ema_decay)
    return replace(round_cfg, lr=cfg.round_lr, steps=cfg.round_steps) if round_idx else round_cfg


def _signature(task: Task, cfg: FitConfig, round_idx: int, start: Checkpoints | None, pseudo_inputs: object) -> str:
    model_settings = signed_sections(task.cfg, "model", *(["classifier"] if task.cfg.model.name == "sks" else []))
    settings = signed("fit", cfg.signed_fields())
    steps = settings.pop("steps")
    origin = start.signature if start else ""
    return sign(task.signature, model_settings, settings, steps, round_idx, origin, pseudo_inputs)


def training_batches(
    task: Task, cfg: FitConfig, round_idx: int, pseudo: Pool | None = None, consistency: Consistency | None = None
) -> Batches:
    """Batches of a round's training: labels, and pseudo masks or unlabeled images if given."""
    size, symmetry = task.cfg.data.patch or task.cfg.data.size, symmetry_of(cfg)
    options = {"symmetry": symmetry, "supersample": cfg.supersample}
    plain, strong = (Augment(size, cfg.augment, strong=strong, **options) for strong in (False, True))
    labeled, unlabeled, pseudo = (p and p.supersampled(cfg.supersample) for p in (task.labeled, task.unlabeled, pseudo))
    plan = BatchPlan(
        seed=task.cfg.seed,
        round_idx=round_idx,
        batch_size=cfg.batch_size,
        augment=plain,
        strong=strong if (consistency.strong if consistency else cfg.strong_augment) else plain,
        labeled_share=1 - cfg.clean_share if cfg.clean_share else cfg.labeled_share,
        max_empty_share=cfg.max_empty_share,
        cutmix=cfg.cutmix,
        view_cutmix=consistency.cutmix if consistency else 0.0,
        num_strong=consistency.num_strong if consistency else 1,
        patch=task.cfg.data.patch and task.cfg.data.patch * cfg.supersample,
    )
    return ViewBatches(labeled, unlabeled, plan) if consistency else Batches(labeled, pseudo, plan)
