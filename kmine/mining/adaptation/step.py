"""Before round 1: the segmenter learns from the labels, prompted as it will be on the unlabeled images.

Every labeled image is prompted by a local model that was trained without it (cross-fitting); the validation images,
prompted by the model of round 0, decide when to stop and whether the adapted segmenter is used.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from kmine.io.files import sign
from kmine.mining.adaptation.finetune import Adaptation, adapt
from kmine.mining.crossfit import out_of_fold, prompted, some_of
from kmine.segmenters.base import Adaptable
from kmine.store.run_folder import RunStore
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train


def adapt_segmenter(task: Task, store: RunStore) -> Task:
    """The task with the adapted segmenter, where there is one and it is better; the same task otherwise.

    The learnt weights (`segmenter/adapted.safetensors`) and what was gained (`segmenter/adaptation.json`) are
    artifacts of the run, and are read back where they were made from the same.
    """
    segmenter, cfg = task.segmenter, task.cfg
    if not (cfg.adapt.enabled and isinstance(segmenter, Adaptable)):
        return task
    folder = store.root / "segmenter"
    fit_settings = {k: v for k, v in asdict(cfg.fit).items() if k not in ("num_workers", "round_steps", "round_lr")}
    settings = [asdict(part) for part in (cfg.model, cfg.classifier, cfg.infer, cfg.prompts, cfg.adapt)]
    made_from = sign(task.signature, segmenter.signature, fit_settings, settings)
    about = store.load_json(folder / "adaptation.json", made_from)
    learnt = store.load_tensors(folder / "adapted.safetensors", made_from)
    if about is None or (about["used"] and learnt is None):
        found = _adapt(task, store, segmenter)
        if found.state is not None:
            store.save_tensors(folder / "adapted.safetensors", found.state, made_from)
        about = {"base": segmenter.name, "base_sha256": segmenter.signature, "used": found.used, **_figures(found)}
        # Last: it says that the adaptation is done.
        store.save_json(folder / "adaptation.json", about, made_from)
        task.watcher.say(sentence(about))
        return replace(task, segmenter=found.segmenter)
    return replace(task, segmenter=segmenter.adapted(learnt[0])) if about["used"] and learnt else task


def sentence(about: dict[str, Any]) -> str:
    """What came of the adaptation, in one sentence; `about` is the content of adaptation.json."""
    if not about["num_objects"] or not about["num_held_out"]:
        return f"{about['base']} was not adapted: the labeled or the validation images hold no object"
    verdict = "used" if about["used"] else "not used: no gain beyond adapt.min_gain"
    prompts = "the local model's prompts" if about["held_out_prompts"] == "local" else "shaken true boxes"
    return (
        f"{about['base']} adapted on {about['num_objects']} labeled objects: IoU {about['iou_before']:.3f} -> "
        f"{about['iou_after']:.3f} on {about['num_held_out']} validation objects, {prompts} (step "
        f"{about['best_step']}); {verdict}"
    )


def _adapt(task: Task, store: RunStore, segmenter: Adaptable) -> Adaptation:
    cfg, seed = task.cfg.adapt, task.cfg.seed
    examples = list(out_of_fold(task, store, some_of(task.labeled, cfg.max_images, seed)))
    model = new_model(task, store)
    model.load_state_dict(train(task, store, model, round_idx=0).best)
    held_out = list(prompted(task, model, task.val, some_of(task.val, cfg.max_images, seed)))
    steps = cfg.steps or segmenter.adapt_plan.steps
    task.watcher.start(f"adapting {segmenter.name}", steps)
    return adapt(
        segmenter,
        examples,
        held_out,
        cfg,
        seed=seed,
        progress=lambda done, loss, iou: task.watcher.advance(done, _text(loss, iou)),
    )


def _text(loss: float, iou: float) -> str:
    return f"loss {loss:.3f}" + (f"  validation IoU {iou:.3f}" if np.isfinite(iou) else "")


def _figures(found: Adaptation) -> dict[str, Any]:
    return {k: v for k, v in vars(found).items() if k not in ("segmenter", "state")}
