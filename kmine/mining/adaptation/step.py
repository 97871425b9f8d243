"""Before round 1: fine-tune the segmenter on the labels, with prompts like those on the unlabeled images.

Every labeled image is prompted by a local model trained without it (cross-fitting). The validation images, prompted by
the model of round 0, decide when to stop and whether the adapted segmenter is used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kmine.io.files import sign
from kmine.mining.adaptation.finetune import adapt
from kmine.mining.crossfit import out_of_fold, sample_ids, validation_examples
from kmine.segmenters.base import FineTunable
from kmine.store.settings import signed, signed_sections
from kmine.training.task import Task
from kmine.training.train_steps import show_progress


def adapt_segmenter(task: Task) -> Task:
    """The task with the adapted segmenter if it is better, else unchanged.

    Weights (`segmenter/adapted.safetensors`) and figures (`segmenter/adaptation.json`) are artifacts of the run; they
    are read back if their signature matches.
    """
    segmenter, cfg = task.segmenter, task.cfg
    if not (cfg.adapt.enabled and isinstance(segmenter, FineTunable)):
        return task
    folder = task.run.root / "segmenter"
    settings = signed_sections(cfg, "model", "classifier", "infer", "prompts", "adapt")
    signature = sign(task.signature, segmenter.signature, signed("fit", cfg.fit.signed_fields()), settings)
    record = task.run.load_json(folder / "adaptation.json", signature)
    finetuned = task.run.load_tensors(folder / "adapted.safetensors", signature)
    if record is not None and not record["used"]:
        return task
    if record is not None and finetuned is not None:
        return replace(task, segmenter=segmenter.with_weights(finetuned[0]))
    examples = list(out_of_fold(task, sample_ids(task.labeled, cfg.adapt.max_images, cfg.seed)))
    held_out = validation_examples(task)
    task.progress.start(f"adapting {segmenter.name}", cfg.adapt.steps or segmenter.fine_tune_defaults.steps)
    progress = show_progress(task.progress, "IoU")
    result = adapt(segmenter, examples, held_out, cfg.adapt, seed=cfg.seed, progress=progress)
    if result.state is not None:
        task.run.save_tensors(folder / "adapted.safetensors", result.state, signature)
    record = {"base": segmenter.name, "base_sha256": segmenter.signature, "used": result.used}
    record |= {name: value for name, value in vars(result).items() if name not in ("segmenter", "state")}
    # Written last: it marks the adaptation as done.
    task.run.save_json(folder / "adaptation.json", record, signature)
    task.progress.log(adaptation_summary(record))
    return replace(task, segmenter=result.segmenter)


def adaptation_summary(record: dict[str, Any]) -> str:
    """Result of the adaptation in one sentence; `record` is the content of adaptation.json."""
    if not record["num_objects"] or not record["num_held_out"]:
        return f"{record['base']} was not adapted: the labeled or the validation images hold no object"
    outcome = "used" if record["used"] else "not used: no gain beyond adapt.min_gain"
    prompts = "the local model's prompts" if record["held_out_prompts"] == "local" else "jittered true boxes"
    return (
        f"{record['base']} adapted on {record['num_objects']} labeled objects: IoU {record['iou_before']:.3f} -> "
        f"{record['iou_after']:.3f} on {record['num_held_out']} validation objects, {prompts} (step "
        f"{record['best_step']}); {outcome}"
    )
