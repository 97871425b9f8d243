"""The local model before its first step."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor

from kmine.data.augment import Augment
from kmine.data.batches import LabelBatches
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.seeding import derive_seed
from kmine.training.checkpoints import _save_state, _training_text
from kmine.training.distributed import rank_zero_first
from kmine.training.task import Task, single_process
from kmine.training.train_steps import FitState


def new_model(task: Task) -> LocalModel:
    """The local model with its first weights, on the device; that of sks with its classifier trained."""
    model = build_model(task.cfg.model, task.num_classes, task.cfg.seed, offline=task.cfg.offline)
    model = model.to(task.fabric.device)
    if task.cfg.model.name == "sks" and model.uses_classifier:
        with rank_zero_first(task.fabric):
            model.classifier.load_state_dict(_classifier(single_process(task), model))
    return model


def _classifier(task: Task, model: LocalModel) -> dict[str, Tensor]:
    """Weights of the classifier of sks: read back if it was trained before, resumed if half done.

    Every labeled and unlabeled image with an image-level label takes part; no mask is read.
    """
    from kmine.training.classifier import fit_classifier

    cfg, folder = task.cfg.classifier, task.run.root / "classifier"
    fit_cfg = replace(task.cfg.fit, lr=cfg.lr)
    settings = {k: getattr(fit_cfg, k) for k in ("weight_decay", "warmup", "augment", "ema_decay", "val_every")}
    signature = sign(task.signature, asdict(task.cfg.model), asdict(cfg), settings)
    done = task.run.load_tensors(folder / "model.safetensors", signature)
    if done:
        return done[0]
    batches = LabelBatches(
        [task.labeled, task.unlabeled],
        Augment(task.cfg.data.size, task.cfg.fit.augment),
        batch_size=cfg.batch_size,
        seed=task.cfg.seed,
        shuffle=cfg.shuffle,
    )
    task.progress.start("classifier: training", cfg.steps)
    saved = task.run.load_tensors(folder / "fit_state.safetensors", signature)
    result = fit_classifier(
        model,
        batches,
        task.val,
        fit_cfg,
        steps=cfg.steps,
        fabric=task.fabric,
        seed=derive_seed(task.cfg.seed, "classifier"),
        resume=FitState.from_tensors(*saved) if saved else None,
        save=lambda state: _save_state(task.run, folder, state, signature),
        progress=lambda done, loss, auc: task.progress.advance(done, _training_text(loss, auc, "AUC")),
    )
    num_images = len(batches.positive) + len(batches.negative)
    meta = {"best_step": result.best_step, "history": result.history, "num_images": num_images}
    task.run.save_json(folder / "metrics.json", {**meta, "shuffled": cfg.shuffle}, signature)
    task.run.save_tensors(folder / "model.safetensors", result.best, signature, **meta)
    (folder / "fit_state.safetensors").unlink(missing_ok=True)
    return result.best
