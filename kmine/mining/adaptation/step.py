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
from kmine.mining.crossfit import out_of_fold, sample_ids, with_prompts
from kmine.segmenters.base import FineTunable
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train


def adapt_segmenter(task: Task) -> Task:
    """The task with the adapted segmenter, where there is one and it is better; the same task otherwise.

    The learnt weights (`segmenter/adapted.safetensors`) and what was gained (`segmenter/adaptation.json`) are
    artifacts of the run, and are read back where they were made from the same.
    """
    segmenter, cfg = task.segmenter, task.cfg
    if not (cfg.adapt.enabled and isinstance(segmenter, FineTunable)):
        return task
    folder = task.run.root / "segmenter"
    settings = [asdict(section) for section in (cfg.model, cfg.classifier, cfg.infer, cfg.prompts, cfg.adapt)]
    signature = sign(task.signature, segmenter.signature, cfg.fit.signed_fields(), settings)
    record = task.run.load_json(folder / "adaptation.json", signature)
    finetuned = task.run.load_tensors(folder / "adapted.safetensors", signature)
    if record is None or (record["used"] and finetuned is None):
        result = _adapt(task, segmenter)
        if result.state is not None:
            task.run.save_tensors(folder / "adapted.safetensors", result.state, signature)
        record = {"base": segmenter.name, "base_sha256": segmenter.signature, "used": result.used, **_figures(result)}
        # Last: it says that the adaptation is done.
        task.run.save_json(folder / "adaptation.json", record, signature)
        task.progress.log(adaptation_summary(record))
        return replace(task, segmenter=result.segmenter)
    return replace(task, segmenter=segmenter.with_weights(finetuned[0])) if record["used"] and finetuned else task


def adaptation_summary(record: dict[str, Any]) -> str:
    """What came of the adaptation, in one sentence; `record` is the content of adaptation.json."""
    if not record["num_objects"] or not record["num_held_out"]:
        return f"{record['base']} was not adapted: the labeled or the validation images hold no object"
    outcome = "used" if record["used"] else "not used: no gain beyond adapt.min_gain"
    prompts = "the local model's prompts" if record["held_out_prompts"] == "local" else "shaken true boxes"
    return (
        f"{record['base']} adapted on {record['num_objects']} labeled objects: IoU {record['iou_before']:.3f} -> "
        f"{record['iou_after']:.3f} on {record['num_held_out']} validation objects, {prompts} (step "
        f"{record['best_step']}); {outcome}"
    )


def _adapt(task: Task, segmenter: FineTunable) -> Adaptation:
    cfg, seed = task.cfg.adapt, task.cfg.seed
    examples = list(out_of_fold(task, sample_ids(task.labeled, cfg.max_images, seed)))
    model = new_model(task)
    model.load_state_dict(train(task, model, round_idx=0).best)
    held_out = list(with_prompts(task, model, task.val, sample_ids(task.val, cfg.max_images, seed)))
    steps = cfg.steps or segmenter.fine_tune_defaults.steps
    task.progress.start(f"adapting {segmenter.name}", steps)
    return adapt(
        segmenter,
        examples,
        held_out,
        cfg,
        seed=seed,
        progress=lambda done, loss, iou: task.progress.advance(done, _text(loss, iou)),
    )


def _text(loss: float, iou: float) -> str:
    return f"loss {loss:.3f}" + (f"  validation IoU {iou:.3f}" if np.isfinite(iou) else "")


def _figures(result: Adaptation) -> dict[str, Any]:
    return {k: v for k, v in vars(result).items() if k not in ("segmenter", "state")}
