"""A local model's training in a round, and the rounds of methods that only train.

A checkpoint is read back where it was made from the same, and resumed where it is half done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from kmine.config import FitConfig
from kmine.data.augment import Augment
from kmine.data.batches import Batches, LabelBatches, ViewBatches
from kmine.data.pool import Pool
from kmine.metrics import case_metrics, summarise
from kmine.models.local import LocalModel, build_model
from kmine.models.together import dealt_back, every_nth, leader_first
from kmine.models.training import FitState
from kmine.records import CaseMetrics, RoundResult, derive_seed
from kmine.rounds.scoring import score
from kmine.rounds.task import Task, Trained, alone
from kmine.stages.fit import Consistency, fit
from kmine.stages.infer import predict_small
from kmine.store import RunStore, sign


def new_model(task: Task, store: RunStore) -> LocalModel:
    """The local model with its first weights, on the device; that of sks with its classifier trained."""
    model = build_model(task.cfg.model, task.num_classes, task.cfg.seed, offline=task.cfg.offline)
    model = model.to(task.fabric.device)
    if task.cfg.model.name == "sks" and model.guided:
        with leader_first(task.fabric):
            model.classifier.load_state_dict(_classifier(alone(task), store, model))
    return model


def trained_witness(task: Task, store: RunStore, arm: str = "witness") -> tuple[LocalModel, str] | None:
    """The second local model, trained on the labels alone as round 0 trains the first, and its signature.

    It sees no pseudo mask in any round, so the loop's own mistakes cannot reach it. None where there is none.
    """
    if task.witness is None:
        return None
    its = replace(task, cfg=replace(task.cfg, model=task.witness), witness=None)
    model = new_model(its, store)
    trained = train(its, store, model, round_idx=0, arm=arm)
    model.load_state_dict(trained.best)
    return model, trained.signature


def _classifier(task: Task, store: RunStore, model: LocalModel) -> dict[str, Tensor]:
    """Weights of the classifier of sks: read back if it was trained before, resumed if half done.

    Every labeled and unlabeled image with an image-level label takes part; no mask is read.
    """
    from kmine.stages.fit_classifier import fit_classifier

    cfg, folder = task.cfg.classifier, store.root / "classifier"
    fit_cfg = replace(task.cfg.fit, lr=cfg.lr)
    settings = {k: getattr(fit_cfg, k) for k in ("weight_decay", "warmup", "augment", "ema_decay", "val_every")}
    made_from = sign(task.signature, asdict(task.cfg.model), asdict(cfg), settings)
    done = store.load_tensors(folder / "model.safetensors", made_from)
    if done:
        return done[0]
    batches = LabelBatches(
        [task.labeled, task.unlabeled],
        Augment(task.cfg.data.size, task.cfg.fit.augment),
        batch_size=cfg.batch_size,
        seed=task.cfg.seed,
        shuffle=cfg.shuffle,
    )
    task.watcher.start("classifier: training", cfg.steps)
    saved = store.load_tensors(folder / "fit_state.safetensors", made_from)
    result = fit_classifier(
        model,
        batches,
        task.val,
        fit_cfg,
        steps=cfg.steps,
        fabric=task.fabric,
        seed=derive_seed(task.cfg.seed, "classifier"),
        resume=FitState.from_tensors(*saved) if saved else None,
        save=lambda state: _save_state(store, folder, state, made_from),
        progress=lambda done, loss, auc: task.watcher.advance(done, _training_text(loss, auc, "AUC")),
    )
    num_images = len(batches.positive) + len(batches.negative)
    about = {"best_step": result.best_step, "history": result.history, "num_images": num_images}
    store.save_json(folder / "metrics.json", {**about, "shuffled": cfg.shuffle}, made_from)
    store.save_tensors(folder / "model.safetensors", result.best, made_from, **about)
    (folder / "fit_state.safetensors").unlink(missing_ok=True)
    return result.best


def train(
    task: Task,
    store: RunStore,
    model: LocalModel,
    *,
    round_idx: int,
    start: Trained | None = None,
    pseudo: Pool | None = None,
    pseudo_signature: str = "",
    consistency: Consistency | None = None,
    arm: str = "",
) -> Trained:
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
        arm: folder of the comparison this belongs to; empty for the loop.
    """
    folder = store.round_dir(round_idx, arm)
    cfg, steps = _schedule(task.cfg.fit if pseudo else task.cfg.fit.labels_alone(), round_idx)
    if consistency:
        cfg = replace(cfg, labeled_share=task.cfg.fit.labeled_share, ema_decay=consistency.ema_decay)
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("num_workers", "steps", "round_steps", "round_lr")}
    origin = start.signature if start else ""
    model_settings = [asdict(task.cfg.model), *([asdict(task.cfg.classifier)] if task.cfg.model.name == "sks" else [])]
    mined_from = (consistency.signature if consistency else pseudo_signature, pseudo.weights if pseudo else {})
    made_from = sign(task.signature, model_settings, settings, steps, round_idx, origin, mined_from)
    done = _read_trained(store, folder, made_from)
    if done:
        (folder / "fit_state.safetensors").unlink(missing_ok=True)  # left where a kill came just before its end
        return done
    if start:
        model.load_state_dict(start.best)
    began = time.perf_counter()
    title = f"round {round_idx}{' ' + arm if arm else ''}: training"
    task.watcher.start(title, steps)
    saved = store.load_tensors(folder / "fit_state.safetensors", made_from)
    # The weak views, seen in eval mode, would crowd out the images of validation that are worth remembering.
    with nullcontext() if consistency else model.remembering(augmented=cfg.augment or cfg.cutmix > 0):
        result = fit(
            model,
            _batches(task, cfg, round_idx, pseudo, consistency),
            cfg,
            steps=steps,
            fabric=task.fabric,
            seed=derive_seed(task.cfg.seed, "fit", round_idx),
            validate=_validator(task),
            resume=FitState.from_tensors(*saved) if saved else None,
            save=lambda state: _save_state(store, folder, state, made_from),
            progress=lambda done, loss, dice: task.watcher.advance(done, _training_text(loss, dice)),
            ask=consistency.ask if consistency else None,
        )
    seconds = time.perf_counter() - began
    store.save_tensors(folder / "model_final.safetensors", result.final, made_from)
    # The chosen checkpoint comes last: it says that the training is done.
    about = {"best_step": result.best_step, "history": result.history, "seconds": seconds}
    store.save_tensors(folder / "model.safetensors", result.best, made_from, **about)
    (folder / "fit_state.safetensors").unlink(missing_ok=True)
    task.fabric.barrier()  # so that no process reads before it is written
    return Trained(made_from, result.best, result.final, seconds)


def train_rounds(
    task: Task, store: RunStore, arm: str, how: Callable[[int], dict[str, Any] | None] = lambda round_idx: {}
) -> Iterator[RoundResult]:
    """Round 0 as the loop has it, then `rounds` times `fit.round_steps` more, each from the last adopted round.

    `how` says for a round what `train` is given beside the labels (`pseudo`, `consistency`); None ends it.
    """
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    for round_idx in range(1, task.cfg.rounds + 1):
        if (given := how(round_idx)) is None:
            return
        fitted = train(task, store, model, round_idx=round_idx, start=current, arm=arm, **given)
        more = {"num_pseudo": len(given.get("pseudo") or ()), "before": adopted, "arm": arm}
        result = score(task, store, model, fitted, round_idx=round_idx, **more)
        yield result
        if result.adopted:
            current, adopted = fitted, result


def _validator(task: Task) -> Callable[[LocalModel], float]:
    """Mean Dice over the validation images at training size: cheap enough to choose checkpoints by."""

    def validate(model: LocalModel) -> float:
        cases: list[CaseMetrics] = []
        share = every_nth(task.val.ids, task.fabric)
        for first in range(0, len(share), task.cfg.infer.batch_size):
            ids = share[first : first + task.cfg.infer.batch_size]
            images = np.stack([task.val.image_small(i) for i in ids])
            probs, _ = predict_small(model, images, "none", task.fabric.device)
            for sample_id, pred in zip(ids, probs.argmax(axis=1).astype(np.uint8), strict=True):
                truth = task.val.mask_small(sample_id)
                cases.append(case_metrics(sample_id, pred, truth, task.num_classes, with_hd95=False))
        return summarise(dealt_back(cases, task.fabric)).dice

    return validate


def _schedule(cfg: FitConfig, round_idx: int) -> tuple[FitConfig, int]:
    """Settings with this round's learning rate, and its optimizer steps."""
    return (cfg, cfg.steps) if round_idx == 0 else (replace(cfg, lr=cfg.round_lr), cfg.round_steps)


def _batches(
    task: Task, cfg: FitConfig, round_idx: int, pseudo: Pool | None, consistency: Consistency | None
) -> Batches:
    plain, strong = (Augment(task.cfg.data.size, cfg.augment, strong=strong) for strong in (False, True))
    how = {name: getattr(cfg, name) for name in ("batch_size", "labeled_share", "cutmix")}
    how |= {"seed": task.cfg.seed, "round_idx": round_idx}
    if consistency:
        view = strong if consistency.strong else plain
        return ViewBatches(task.labeled, task.unlabeled, plain, strong=view, view_cutmix=consistency.cutmix, **how)
    how["max_empty_share"] = cfg.max_empty_share
    return Batches(task.labeled, pseudo, plain, pseudo_augment=strong if cfg.strong_augment else None, **how)


def _training_text(loss: float, score: float, name: str = "Dice") -> str:
    return f"loss {loss:.3f}" + f"  validation {name} {score:.3f}" * bool(np.isfinite(score))


def _save_state(store: RunStore, folder: Any, state: FitState, signature: str) -> None:
    tensors, plain = state.to_tensors()
    store.save_tensors(folder / "fit_state.safetensors", tensors, signature, **plain)


def _read_trained(store: RunStore, folder: Any, signature: str) -> Trained | None:
    best = store.load_tensors(folder / "model.safetensors", signature)
    final = store.load_tensors(folder / "model_final.safetensors", signature)
    return Trained(signature, best[0], final[0], best[1]["seconds"]) if best and final else None
