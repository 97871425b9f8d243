"""Before round 1: what the gate's evidence is worth, learnt on labeled images treated as if they had no mask.

Each part of the labeled images goes through the whole of mining: prompted by a local model, answered by a segmenter,
neither of which was taught with that part. Their masks are looked at only to say how good the answers were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.mining.adaptation.finetune import Example, adapt
from kmine.mining.calibration.fit import (
    MIN_OBJECTS,
    choose_threshold,
    fit_calibrator,
    reliability,
    risk_coverage,
    true_dice,
)
from kmine.mining.calibration.local_step import calibrate_local_quality, rank_correlation
from kmine.mining.candidates import (
    generate_prompts,
    median_object_area,
    predict_auxiliary,
    predict_probs,
    segment_prompts,
)
from kmine.mining.context import ImageBatch, RoundContext
from kmine.mining.crossfit import fold_auxiliary_model, fold_model, folds, sample_ids, with_prompts
from kmine.mining.gate import collect_evidence
from kmine.ops.calibrator import FEATURES, Calibration, RiskGuarantee
from kmine.ops.masks import components
from kmine.segmenters.base import ADAPTED, FineTunable, Segmenter
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import IGNORE_INDEX, Evidence

Row = dict[str, Any]


def calibrate(task: Task, base: Segmenter | None) -> Task:
    """The task with its gate calibrated, where the labels are enough for that; the same task otherwise.

    Evidence and Dice of each part (`calibration/fold_N.json`) and what was learnt from them
    (`calibration/calibration.json`) are artifacts of the run, read back where they were made from the same. Beside it
    stands what the local model's own masks can be estimated by (`calibrate_local_quality`), which decides nothing here.

    Args:
        task: with the segmenter as it will mine.
        base: the segmenter as it was before it learnt from the labels; the parts' own are made from it.
        store: where artifacts go.
    """
    cfg = task.cfg
    if task.segmenter is None or base is None or cfg.gate.mode != "calibrated":
        return task
    fold_ids = folds(task.labeled, cfg.adapt.folds, cfg.seed)
    settings = [asdict(section) for section in (cfg.model, cfg.classifier, cfg.infer, cfg.prompts, cfg.adapt)]
    settings.append(asdict(task.auxiliary_model) if task.auxiliary_model else {})
    signature = sign(task.signature, task.segmenter.signature, cfg.fit.signed_fields(), settings)
    if (count := _num_objects(task.labeled)) < MIN_OBJECTS or len(fold_ids) < 2:
        # Hardly more could be found than there are: nobody need be trained to see that.
        record: Row = {"num_objects": count, "num_parts": len(fold_ids), "promise": None, "alone": None}
    else:
        rows = list(_all_rows(task, base, fold_ids, signature))
        record = fit_calibration(rows, cfg.gate.target_dice, cfg.gate.confidence, cfg.gate.margin, cfg.seed)
        record["alone"] = calibrate_local_quality(task, fold_ids)
    task.run.save_json(task.run.root / "calibration" / "calibration.json", record, signature)
    task.progress.log(calibration_summary(record))
    return replace(task, calibration=Calibration.from_json(record) if record["promise"] else None)


def _num_objects(pool: Pool) -> int:
    """True objects of all classes, at the size of training."""
    masks = (pool.mask_resized(sample_id) for sample_id in pool.ids)
    return sum(
        len(components(mask == class_id))
        for mask in masks
        for class_id in np.unique(mask)
        if class_id not in (0, IGNORE_INDEX)
    )


def fit_calibration(rows: Sequence[Row], target: float, confidence: float, margin: float, seed: int) -> Row:
    """Content of calibration.json from the objects' evidence and Dice; `promise` is None where they are too few."""
    # Where nothing but ignored pixels is left, there is no Dice.
    rows = [row for row in rows if row["dice_segmenter"] is not None and row["dice_local"] is not None]
    record = {"target": target, "confidence": confidence, "num_objects": len(rows)}
    evidence = [Evidence(*(_none_to_nan(row[name]) for name in FEATURES)) for row in rows]
    groups = [row["group_id"] for row in rows]
    dice = {name: np.array([row[f"dice_{name}"] for row in rows], float) for name in ("segmenter", "local")}
    fitted = {name: fit_calibrator(evidence, dice[name], groups, seed=seed) for name in dice}
    if fitted["segmenter"] is None or fitted["local"] is None:
        return record | {"promise": None}
    (segmenter_calibrator, segmenter_estimates), (local_calibrator, local_estimates) = (
        fitted["segmenter"],
        fitted["local"],
    )
    # The same choice as the gate's, on estimates made without the object.
    use_local = local_estimates >= segmenter_estimates + margin
    estimates, truth = (
        np.where(use_local, local_estimates, segmenter_estimates),
        np.where(use_local, dice["local"], dice["segmenter"]),
    )
    guarantee = choose_threshold(estimates, truth, target=target, confidence=confidence)
    return record | {
        **Calibration(segmenter_calibrator, local_calibrator, guarantee).to_json(),
        "rank_correlation": rank_correlation(estimates, truth),
        "mean_dice": {name: float(values.mean()) for name, values in dice.items()},
        "risk_coverage": risk_coverage(estimates, truth),
        "reliability": reliability(estimates, truth),
    }


def calibration_summary(record: Row) -> str:
    """What came of the calibration, in one sentence; `record` is the content of calibration.json."""
    if record.get("num_parts", 2) < 2:
        return (
            "the gate is not calibrated: with adapt.folds 1, or a single group, no labeled image is unknown to the "
            "models that would be asked; its thresholds decide"
        )
    if not record["promise"]:
        return (
            f"the gate is not calibrated: {record['num_objects']} objects of labeled images are too few; "
            "its thresholds decide"
        )
    guarantee = RiskGuarantee.from_json(record["promise"])
    target = f"a mean Dice of {record['target']:.2f} at {record['confidence']:.0%}"
    at = f"masks from estimated Dice {guarantee.threshold:.2f} on ({guarantee.coverage:.0%} of {guarantee.num_objects} labeled objects)"
    if guarantee.kept:
        return f"the gate keeps {at} and promises {target} confidence (bound {guarantee.lower_bound:.2f}, seen {guarantee.mean:.2f})"
    instead = f"Each round keeps as many masks as have a mean estimate of {record['target']:.2f}"
    if not guarantee.coverage:
        return (
            f"{target} confidence cannot be promised: none of {guarantee.num_objects} labeled objects reaches an estimated "
            f"Dice of {guarantee.threshold:.2f}. {instead}"
        )
    return (
        f"not enough labels to promise {target} confidence; {guarantee.lower_bound:.2f} can be promised for {at}, where "
        f"{guarantee.mean:.2f} was seen. {instead}"
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
    """Evidence and Dice of the objects found in each part, by models that do not know it."""
    cfg = task.cfg
    sampled = set(sample_ids(task.labeled, cfg.adapt.max_images, cfg.seed))
    examples, models, auxiliary_models = [], [], []
    for fold_idx, held_out_ids in enumerate(fold_ids):
        models.append(fold_model(task, fold_idx, held_out_ids))
        auxiliary_models.append(fold_auxiliary_model(task, fold_idx, held_out_ids))
        examples.append(list(with_prompts(task, models[-1], task.labeled, [i for i in held_out_ids if i in sampled])))
    held_out = _held_out(task)
    out = []
    for fold_idx, held_out_ids in enumerate(fold_ids):
        if saved[fold_idx] is not None:
            out.append(saved[fold_idx])
            continue
        others = [example for n, fold_examples in enumerate(examples) if n != fold_idx for example in fold_examples]
        title = f"calibrating the gate: part {fold_idx + 1} of {len(fold_ids)}"
        segmenter = _finetuned_without(task, base, others, held_out, title)
        rest = task.labeled.subset([i for i in task.labeled.ids if i not in set(held_out_ids)])
        area_prior = median_object_area(rest, task.num_classes)
        pair = models[fold_idx], auxiliary_models[fold_idx]
        ctx = RoundContext(task, *pair, segmenter, task.labeled, area_prior)
        out.append({"objects": list(_evidence_rows(ctx, held_out_ids))})
    return out


def _held_out(task: Task) -> list[Example]:
    if not task.segmenter.name.endswith(ADAPTED):
        return []
    model = new_model(task)
    model.load_state_dict(train(task, model, round_idx=0).best)
    return list(with_prompts(task, model, task.val, sample_ids(task.val, task.cfg.adapt.max_images, task.cfg.seed)))


def _finetuned_without(
    task: Task, base: Segmenter, examples: Sequence[Example], held_out: Sequence[Example], title: str
) -> Segmenter:
    """The segmenter as it would mine, had it been taught with `examples` alone."""
    if not (task.segmenter.name.endswith(ADAPTED) and isinstance(base, FineTunable)):
        return base
    task.progress.start(title, task.cfg.adapt.steps or base.fine_tune_defaults.steps)
    return adapt(
        base,
        examples,
        held_out,
        task.cfg.adapt,
        seed=task.cfg.seed,
        progress=lambda done, loss, iou: task.progress.advance(done),
    ).segmenter


def _evidence_rows(ctx: RoundContext, ids: Sequence[str]) -> Iterator[Row]:
    """One row an object, as mining would find it in images of which nothing is known."""
    task, size = ctx.task, ctx.task.mining_batch_size
    for first in range(0, len(ids), size):
        samples = [task.labeled.sample(i) for i in ids[first : first + size]]
        batch = ImageBatch([replace(sample, mask=None, image_label=None) for sample in samples])
        probs = predict_probs(ctx, batch)
        prompts, candidates = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
        auxiliary = predict_auxiliary(ctx, batch)
        for sample, p, image_prompts, image_candidates, auxiliary_probs in zip(
            samples, probs, prompts, candidates, auxiliary, strict=True
        ):
            for prompt, candidate in zip(image_prompts, image_candidates, strict=True):
                best = candidate.masks[candidate.best]
                # Where the local model has no object of its own, its mask of it is empty, as in the decisions.
                local = prompt.component if prompt.component is not None else np.zeros_like(best)
                yield {
                    "sample_id": sample.sample_id,
                    "group_id": task.labeled.group_of(sample.sample_id),
                    **dict(
                        zip(
                            FEATURES,
                            astuple(collect_evidence(p, prompt, candidate, ctx.area_prior, auxiliary_probs)),
                            strict=True,
                        )
                    ),
                    "dice_segmenter": _nan_to_none(true_dice(best, prompt, sample.mask)),
                    "dice_local": _nan_to_none(true_dice(local, prompt, sample.mask)),
                }


def _nan_to_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _none_to_nan(value: float | None) -> float:
    return float("nan") if value is None else value
