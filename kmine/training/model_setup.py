"""The local model before its first training step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

from torch import Tensor

from kmine.data.augment import Augment, symmetry_of
from kmine.data.batches import LabelBatches
from kmine.data.pool import spaced_images
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.models.encoder_weights import LostWeightsError
from kmine.models.sks import SksModel
from kmine.ops.seeding import derive_seed
from kmine.store.history import record_history
from kmine.store.settings import signed, signed_sections
from kmine.training.checkpoints import Checkpointer
from kmine.training.distributed import Fabric, rank_zero_first
from kmine.training.task import Task, single_process
from kmine.training.train_steps import Callbacks, show_progress

FIT_SETTINGS = (
    *("weight_decay", "warmup", "augment", "ema_decay", "val_every"),
    *("decay_norms", "encoder_lr", "clip_grad", "flips", "rotation", "scale"),
)
"""Settings of `fit` that the classifier's training has in common with that of the local model."""
MAX_RESTORING = 192
"""Training images from which folded batch norms are restored, evenly spaced."""


def new_model(task: Task) -> LocalModel:
    """The local model with its initial weights, on the device; for sks with a trained classifier.

    Without the encoder weights that the run began with it can only be loaded with a checkpoint: see
    `LocalModel.require_weights`.
    """
    cfg, shape = task.cfg, (task.cfg.model, task.num_classes, task.cfg.seed)
    try:
        pools = (task.labeled, task.unlabeled)
        model = build_model(*shape, offline=cfg.offline, images=lambda: spaced_images(pools, MAX_RESTORING))
    except LostWeightsError as error:
        model = build_model(*shape, pretrained=False)
        model.lost_weights = error
    model = model.with_patch(cfg.data.patch).to(task.fabric.device)
    if isinstance(model, SksModel) and model.uses_classifier:
        with rank_zero_first(task.fabric):
            model.classifier.load_state_dict(_train_classifier(single_process(task), model))
        if task.cfg.model.fine_init == "classifier":
            model.net.fine.load_state_dict(model.net.coarse.pyramid.state_dict())
    return model


def _train_classifier(task: Task, model: SksModel) -> dict[str, Tensor]:
    """Weights of the classifier of sks: read back if trained before, resumed if interrupted.

    Trains on all labeled and unlabeled images with an image-level label; no mask is read.
    """
    from kmine.training.classifier import fit_classifier, has_stopped_rising, image_auc

    cfg = task.cfg.classifier
    fit_cfg = replace(task.cfg.fit, lr=cfg.lr, steps=cfg.steps, checkpoint="last")
    settings = signed("fit", {name: getattr(fit_cfg, name) for name in FIT_SETTINGS})
    signature = sign(task.signature, *signed_sections(task.cfg, "model", "classifier"), settings)
    checkpointer = Checkpointer(task.run, task.run.root / "classifier", signature)
    record = partial(record_history, task.run, "classifier", 0)
    if finished := checkpointer.load_best():
        record(finished[1].get("history", ()), finished[1].get("clock", ()))
        return finished[0]
    state = checkpointer.load_state()
    if state is None:
        model.require_weights()
    pools = [task.labeled, task.unlabeled]
    augment = Augment(task.cfg.data.size, fit_cfg.augment, symmetry=symmetry_of(fit_cfg))
    batches = LabelBatches(pools, augment, batch_size=cfg.batch_size, seed=task.cfg.seed, shuffle=cfg.shuffle)
    task.progress.start("classifier: training", cfg.steps)
    validate = partial(image_auc, pool=task.val, device=task.fabric.device)
    result = fit_classifier(
        model,
        batches,
        fit_cfg,
        fabric=cast(Fabric, task.fabric),
        seed=derive_seed(task.cfg.seed, "classifier"),
        callbacks=Callbacks(
            validate,
            checkpointer.save_state,
            checkpointer.SAVE_EVERY_S,
            show_progress(task.progress, "AUC"),
            partial(has_stopped_rising, patience=cfg.patience),
            record,
        ),
        resume=state,
    )
    num_images = len(batches.positive) + len(batches.negative)
    meta = {"best_step": result.best_step, "history": result.history, "num_images": num_images}
    task.run.save_json(checkpointer.folder / "metrics.json", {**meta, "shuffled": cfg.shuffle}, signature)
    checkpointer.save_best(result.best, clock=result.clock, **meta)
    return result.best
