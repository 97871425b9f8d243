"""Before round 1: calibrate the gate on labeled images treated as if they had no mask.

Each fold of the labeled images runs through all of mining, with a local model and a segmenter that were not trained on
it. Its masks serve only to compute the true Dice of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.mining import candidates as stages
from kmine.mining import crossfit
from kmine.mining.adaptation.finetune import Example, adapt
from kmine.mining.calibration import fit
from kmine.mining.calibration.local_step import Row, calibrate_local_quality
from kmine.mining.context import ImageBatch, RoundContext
from kmine.mining.gate import collect_evidence
from kmine.ops.calibrator import Calibration, RiskGuarantee, evidence_from_row, evidence_row
from kmine.ops.masks import components
from kmine.segmenters.base import ADAPTED, FineTunable, Segmenter
from kmine.store.settings import signed, signed_sections
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX


def calibrate(task: Task, base: Segmenter | None) -> Task:
    """The task with its gate calibrated if there are enough labels, else unchanged.

    Evidence and Dice of each fold (`calibration/fold_N.json`) and the result (`calibration/calibration.json`) are
    artifacts of the run, read back if their signature matches. The result also has the calibration of
    `calibrate_local_quality`, which mining does not use. `base` is the segmenter before it was adapted; the folds' own
    segmenters are fine-tuned from it.
    """
    cfg = task.cfg
    if task.segmenter is None or base is None or cfg.gate.mode != "calibrated":
        return task
    fold_ids = crossfit.folds(task.labeled, cfg.adapt.folds, cfg.seed)
    settings = signed_sections(cfg, "model", "classifier", "infer", "prompts", "adapt")
    settings.append(signed("model", task.auxiliary_model) if task.auxiliary_model else {})
    signature = sign(task.signature, task.segmenter.signature, signed("fit", cfg.fit.signed_fields()), settings)
    if (count := _num_objects(task.labeled)) < fit.MIN_OBJECTS or len(fold_ids) < 2:
        # Mining hardly finds more objects than there are: no fold model is trained in vain.
        record: Row = {"num_objects": count, "num_parts": len(fold_ids), "promise": None, "alone": None}
    else:
        rows = list(_all_rows(task, base, fold_ids, signature))
        record = fit_calibration(rows, cfg.gate.target_dice, cfg.gate.confidence, cfg.gate.margin, cfg.seed)
        record["alone"] = calibrate_local_quality(task, fold_ids)
    task.run.save_json(task.run.root / "calibration" / "calibration.json", record, signature)
    task.progress.log(calibration_summary(record))
    return replace(task, calibration=Calibration.from_json(record) if record["promise"] else None)


def _num_objects(pool: Pool) -> int:
    """True objects of all classes, at training size."""
    masks = (pool.mask_resized(sample_id) for sample_id in pool.ids)
    pairs = ((mask, class_id) for mask in masks for class_id in np.unique(mask) if class_id not in (0, IGNORE_INDEX))
    return sum(len(components(mask == class_id)) for mask, class_id in pairs)


def fit_calibration(rows: Sequence[Row], target: float, confidence: float, margin: float, seed: int) -> Row:
    """Content of calibration.json from the objects' evidence and Dice; `promise` is None with too few objects."""
    record = {"target": target, "confidence": confidence, "num_objects": len(rows)}
    evidence, groups = list(map(evidence_from_row, rows)), [row["group_id"] for row in rows]
    dice = {name: np.array([row[f"dice_{name}"] for row in rows], float) for name in ("segmenter", "local")}
    segmenter, local = (fit.fit_calibrator(evidence, values, groups, seed=seed) for values in dice.values())
    if segmenter is None or local is None:
        return record | {"promise": None}
    # The gate's own choice between the two masks, here on out-of-fold estimates.
    use_local = local.out_of_fold >= segmenter.out_of_fold + margin
    estimates = np.where(use_local, local.out_of_fold, segmenter.out_of_fold)
    truth = np.where(use_local, dice["local"], dice["segmenter"])
    guarantee = fit.choose_threshold(estimates, truth, target=target, confidence=confidence)
    return record | {
        **Calibration(segmenter.calibrator, local.calibrator, guarantee).to_json(),
        "rank_correlation": fit.rank_correlation(estimates, truth),
        "mean_dice": {name: float(values.mean()) for name, values in dice.items()},
        "risk_coverage": fit.risk_coverage(estimates, truth),
        "reliability": fit.reliability(estimates, truth),
    }


def calibration_summary(record: Row) -> str:
    """Result of the calibration in one sentence; `record` is the content of calibration.json."""
    if not record["promise"]:
        reason = f"{record['num_objects']} objects of labeled images are too few"
        if record.get("num_parts", 2) < 2:
            reason = "with adapt.folds 1, or a single group, there is no model that was not trained on an image"
        return f"the gate is not calibrated: {reason}; the thresholds of gate are used"
    guarantee = RiskGuarantee.from_json(record["promise"])
    target = f"a mean Dice of {record['target']:.2f} at {record['confidence']:.0%} confidence"
    masks = (
        f"masks from estimated Dice {guarantee.threshold:.2f} on ({guarantee.coverage:.0%} of "
        f"{guarantee.num_objects} labeled objects)"
    )
    if guarantee.holds:
        bound = f"lower bound {guarantee.lower_bound:.2f}, measured {guarantee.mean:.2f}"
        return f"the gate keeps {masks} and guarantees {target} ({bound})"
    instead = f"Each round keeps as many masks as have a mean estimate of {record['target']:.2f}"
    if not guarantee.coverage:
        return (
            f"{target} cannot be guaranteed: none of {guarantee.num_objects} labeled objects reaches an estimated "
            f"Dice of {guarantee.threshold:.2f}. {instead}"
        )
    return (
        f"too few labels to guarantee {target}; {guarantee.lower_bound:.2f} is guaranteed for {masks}, with a measured "
        f"mean of {guarantee.mean:.2f}. {instead}"
    )


def _all_rows(task: Task, base: Segmenter, fold_ids: Sequence[Sequence[str]], signature: str) -> Iterator[Row]:
    paths = [task.run.root / "calibration" / f"fold_{n}.json" for n in range(len(fold_ids))]
    saved = [task.run.load_json(path, signature) for path in paths]
    if None in saved:
        saved = _measure(task, base, fold_ids, saved)
        for path, fold in zip(paths, saved, strict=True):
            task.run.save_json(path, fold, signature)
    for fold in saved:
        yield from fold["objects"]


def _measure(task: Task, base: Segmenter, fold_ids: Sequence[Sequence[str]], saved: Sequence[Row | None]) -> list[Row]:
    """Evidence and Dice of the objects found in each fold, by models that were not trained on it."""
    sampled = set(crossfit.sample_ids(task.labeled, task.cfg.adapt.max_images, task.cfg.seed))
    examples, models, auxiliary_models = [], [], []
    for fold_idx, held_out_ids in enumerate(fold_ids):
        models.append(crossfit.fold_model(task, fold_idx, held_out_ids))
        auxiliary_models.append(crossfit.fold_auxiliary_model(task, fold_idx, held_out_ids))
        ids = [i for i in held_out_ids if i in sampled]
        examples.append(list(crossfit.with_prompts(task, models[-1], task.labeled, ids)))
    held_out = crossfit.validation_examples(task) if task.segmenter.name.endswith(ADAPTED) else []
    out = []
    for fold_idx, held_out_ids in enumerate(fold_ids):
        if saved[fold_idx] is not None:
            out.append(saved[fold_idx])
            continue
        others = [example for n, fold_examples in enumerate(examples) if n != fold_idx for example in fold_examples]
        title = f"calibrating the gate: fold {fold_idx + 1} of {len(fold_ids)}"
        segmenter = _finetuned_without(task, base, others, held_out, title)
        area_prior = stages.median_object_area(crossfit.remaining_labels(task, held_out_ids), task.num_classes)
        ctx = RoundContext(task, models[fold_idx], auxiliary_models[fold_idx], segmenter, task.labeled, area_prior)
        out.append({"objects": list(_evidence_rows(ctx, held_out_ids))})
    return out


def _finetuned_without(
    task: Task, base: Segmenter, examples: Sequence[Example], held_out: Sequence[Example], title: str
) -> Segmenter:
    """The segmenter of a fold: `base` fine-tuned on the `examples` of the other folds; `base` if it is not adapted."""
    if not (task.segmenter.name.endswith(ADAPTED) and isinstance(base, FineTunable)):
        return base
    task.progress.start(title, task.cfg.adapt.steps or base.fine_tune_defaults.steps)
    settings = {"seed": task.cfg.seed, "progress": lambda done, loss, iou: task.progress.advance(done)}
    return adapt(base, examples, held_out, task.cfg.adapt, **settings).segmenter


def _evidence_rows(ctx: RoundContext, ids: Sequence[str]) -> Iterator[Row]:
    """One row per object that mining finds in images whose masks and image-level labels are hidden."""
    task, size = ctx.task, ctx.task.mining_batch_size
    for first in range(0, len(ids), size):
        samples = [task.labeled.sample(i) for i in ids[first : first + size]]
        batch = ImageBatch([replace(sample, mask=None, image_label=None) for sample in samples])
        probs = stages.predict_probs(ctx, batch)
        prompts, candidates = stages.segment_prompts(ctx, batch, stages.generate_prompts(ctx, batch, probs))
        images = zip(samples, probs, stages.predict_auxiliary(ctx, batch), prompts, candidates, strict=True)
        for sample, p, auxiliary, *objects in images:
            for prompt, candidate in zip(*objects, strict=True):
                best = candidate.masks[candidate.best]
                # Without a component the local model's mask is empty, as in the table of decisions.
                local = prompt.component if prompt.component is not None else np.zeros_like(best)
                yield {
                    "sample_id": sample.sample_id,
                    "group_id": task.labeled.group_of(sample.sample_id),
                    **evidence_row(collect_evidence(p, prompt, candidate, ctx.area_prior, auxiliary)),
                    "dice_segmenter": fit.true_dice(best, prompt, sample.mask),
                    "dice_local": fit.true_dice(local, prompt, sample.mask),
                }
