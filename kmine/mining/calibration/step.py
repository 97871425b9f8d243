"""Before round 1: calibrate the gate on labeled images treated as if they had no mask.

Each fold of the labeled images runs through all of mining, with a local model and a segmenter that were not trained on
it. Its masks serve only to compute the true Dice of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kmine.io.files import sign
from kmine.mining import candidates as stages
from kmine.mining import crossfit
from kmine.mining.adaptation.finetune import Example, adapt
from kmine.mining.calibration import fit
from kmine.mining.calibration.local_step import Row, calibrate_local_quality
from kmine.mining.context import ImageBatch, RoundContext
from kmine.mining.gate import Beside, collect_evidence
from kmine.mining.memory import memory_of
from kmine.mining.refine import merge_objects
from kmine.ops import metrics
from kmine.ops.calibrator import Calibration, RiskGuarantee, evidence_from_row, evidence_row
from kmine.segmenters.base import ADAPTED, FineTunable, Segmenter
from kmine.store.settings import signed, signed_sections
from kmine.training.task import Task
from kmine.types import Candidate, Decision, Evidence, Probs, Prompts

USED = Decision(True, "kept", Evidence(), source="segmenter")


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
    settings = [*signed_sections(cfg, "model", "classifier", "infer", "prompts", "adapt"), cfg.refine.min_vote]
    settings.append(signed("model", task.auxiliary_model) if task.auxiliary_model else {})
    settings += stages.sign_areas(cfg.data)
    signature = sign(task.signature, task.segmenter.signature, signed("fit", cfg.fit.signed_fields()), settings)
    if (count := crossfit.num_objects(task.labeled)) < fit.MIN_OBJECTS or len(fold_ids) < 2:
        # Mining hardly finds more objects than there are: no fold model is trained in vain.
        record: Row = {"num_objects": count, "num_parts": len(fold_ids), "promise": None, "alone": None}
    else:
        rows = list(_all_rows(task, base, fold_ids, signature))
        settings = (cfg.gate.target_dice, cfg.gate.confidence, cfg.gate.margin, cfg.seed)
        record = fit_calibration(rows, *settings, ask_local=cfg.refine.ask_local)
        record["alone"] = calibrate_local_quality(task, fold_ids)
    task.run.save_json(task.run.root / "calibration" / "calibration.json", record, signature)
    task.progress.log(calibration_summary(record))
    return replace(task, calibration=Calibration.from_json(record) if record["promise"] else None)


def fit_calibration(
    rows: Sequence[Row], target: float, confidence: float, margin: float, seed: int, *, ask_local: bool = True
) -> Row:
    """Content of calibration.json from the objects' evidence and Dice; `promise` is None with too few objects."""
    record = {"target": target, "confidence": confidence, "num_objects": len(rows)}
    evidence, groups = list(map(evidence_from_row, rows)), [row["group_id"] for row in rows]
    dice = {name: np.array([row[f"dice_{name}"] for row in rows], float) for name in ("segmenter", "local")}
    fitted = fit.fit_gate(evidence, (dice["segmenter"], dice["local"]), groups, margin=margin, seed=seed)
    if fitted is None:
        return record | {"promise": None}
    estimates, truth = fitted.estimates, np.where(fitted.sides < 0, dice["local"], dice["segmenter"])
    guarantee = fit.choose_threshold(estimates, truth, target=target, confidence=confidence)
    has_local = fitted.sides != 0
    pair = (fitted.differences[has_local], (dice["segmenter"] - dice["local"])[has_local])
    changes = (fitted.sides >= 0) & (not ask_local or (fitted.differences >= margin) | ~has_local)
    return record | {
        **Calibration(fitted.quality, fitted.difference, guarantee).to_json(),
        "rank_correlation": fit.rank_correlation(estimates, truth),
        "rank_correlation_difference": fit.rank_correlation(*pair) if has_local.any() else float("nan"),
        "mean_dice": {name: float(values.mean()) for name, values in dice.items()},
        "correction": _correction(rows, kept=estimates >= guarantee.threshold, changes=changes),
        "risk_coverage": fit.risk_coverage(estimates, truth),
        "reliability": fit.reliability(estimates, truth),
    }


def _correction(rows: Sequence[Row], *, kept: NDArray[np.bool_], changes: NDArray[np.bool_]) -> list[float] | None:
    """Shares of `metrics.Correction` over the images with a kept object; None where the rows have no pixels of it.

    `changes`: objects whose pseudo mask is the segmenter's where it differs from the local model's.
    """
    if any("wrong" not in row for row in rows):
        return None
    parts = [metrics.Correction(0, rows[n]["corrected"], rows[n]["broken"]) for n in np.flatnonzero(kept & changes)]
    wrong = {rows[n]["sample_id"]: rows[n]["wrong"] for n in np.flatnonzero(kept)}
    return list(metrics.Correction.total([*parts, metrics.Correction(sum(wrong.values()), 0, 0)]).shares)


def lacks_folds(record: Row) -> bool:
    """Whether the objects of calibration.json would do, and only models that were not trained on them are missing."""
    return record["num_objects"] >= fit.MIN_OBJECTS and record.get("num_parts", 2) < 2


def calibration_summary(record: Row) -> str:
    """Result of the calibration in one sentence; `record` is the content of calibration.json."""
    if not record["promise"]:
        reason = f"{record['num_objects']} objects of labeled images are too few"
        if lacks_folds(record):
            reason = "with adapt.folds 1, or a single group, there is no model that was not trained on an image"
        return f"the gate is not calibrated: {reason}; objects are ranked by their evidence (gate.keep)"
    guarantee = RiskGuarantee.from_json(record["promise"])
    target = f"a mean Dice of {record['target']:.2f} at {record['confidence']:.0%} confidence"
    masks = (
        f"masks from estimated Dice {guarantee.threshold:.2f} on ({guarantee.coverage:.0%} of "
        f"{guarantee.num_objects} labeled objects)"
    )
    if guarantee.holds:
        bound = f"lower bound {guarantee.lower_bound:.2f}, measured {guarantee.mean:.2f}"
        return f"the gate keeps {masks} and guarantees {target} ({bound}){_correction_sentence(record)}"
    instead = f"Each round keeps as many masks as have a mean estimate of {record['target']:.2f}"
    if not guarantee.coverage:
        return (
            f"{target} cannot be guaranteed: none of {guarantee.num_objects} labeled objects reaches an estimated "
            f"Dice of {guarantee.threshold:.2f}. {instead}"
        )
    return (
        f"too few labels to guarantee {target}; {guarantee.lower_bound:.2f} is guaranteed for {masks}, with a measured "
        f"mean of {guarantee.mean:.2f}. {instead}{_correction_sentence(record)}"
    )


def _correction_sentence(record: Row) -> str:
    shares = metrics.correction_text(record.get("correction"))
    return f". Wrong pixels of the fold models there corrected / newly broken: {shares}" if shares != "–" else ""


def _all_rows(task: Task, base: Segmenter, fold_ids: Sequence[Sequence[str]], signature: str) -> Iterator[Row]:
    paths = [task.run.root / "calibration" / f"fold_{n}.json" for n in range(len(fold_ids))]
    saved = [task.run.load_json(path, signature) for path in paths]
    if missing := [n for n, fold in enumerate(saved) if fold is None]:
        for n, fold in _measure(task, base, fold_ids, missing):
            task.run.save_json(paths[n], fold, signature)  # at once, so that a kill costs the fold at work alone
            saved[n] = fold
    for fold in saved:
        yield from fold["objects"]


def _measure(
    task: Task, base: Segmenter, fold_ids: Sequence[Sequence[str]], missing: Sequence[int]
) -> Iterator[tuple[int, Row]]:
    """Evidence and Dice of the objects found in each of the folds `missing`, by models that were not trained on it."""
    sampled = set(crossfit.sample_ids(task.labeled, task.cfg.adapt.max_images, task.cfg.seed))
    examples, models, auxiliary_models = [], [], []
    for fold_idx, held_out_ids in enumerate(fold_ids):
        models.append(crossfit.fold_model(task, fold_idx, held_out_ids))
        auxiliary_models.append(crossfit.fold_auxiliary_model(task, fold_idx, held_out_ids))
        ids = [i for i in held_out_ids if i in sampled]
        examples.append(list(crossfit.with_prompts(task, models[-1], task.labeled, ids)))
    held_out = crossfit.validation_examples(task) if task.segmenter.name.endswith(ADAPTED) else []
    for fold_idx in missing:
        held_out_ids = fold_ids[fold_idx]
        others = [example for n, fold_examples in enumerate(examples) if n != fold_idx for example in fold_examples]
        title = f"calibrating the gate: fold {fold_idx + 1} of {len(fold_ids)}"
        segmenter = _finetuned_without(task, base, others, held_out, title)
        rest = crossfit.remaining_labels(task, held_out_ids)
        area_prior = stages.median_object_area(rest, task.num_classes)
        ctx = RoundContext(task, models[fold_idx], auxiliary_models[fold_idx], segmenter, task.labeled, area_prior)
        ctx = replace(ctx, memory=memory_of(task, rest))
        yield fold_idx, {"objects": list(evidence_rows(ctx, held_out_ids))}


def _finetuned_without(
    task: Task, base: Segmenter, examples: Sequence[Example], held_out: Sequence[Example], title: str
) -> Segmenter:
    """The segmenter of a fold: `base` fine-tuned on the `examples` of the other folds; `base` if it is not adapted."""
    if not (task.segmenter.name.endswith(ADAPTED) and isinstance(base, FineTunable)):
        return base
    task.progress.start(title, task.cfg.adapt.steps or base.fine_tune_defaults.steps)
    settings = {"seed": task.cfg.seed, "progress": lambda done, loss, iou: task.progress.advance(done)}
    return adapt(base, examples, held_out, task.cfg.adapt, **settings).segmenter


def evidence_rows(ctx: RoundContext, ids: Sequence[str]) -> Iterator[Row]:
    """One row per object that mining finds in images whose masks and image-level labels are hidden."""
    task, size = ctx.task, ctx.task.mining_batch_size
    for first in range(0, len(ids), size):
        samples = [task.labeled.sample(i) for i in ids[first : first + size]]
        batch = ImageBatch([replace(sample, mask=None, image_label=None) for sample in samples])
        probs = stages.predict_probs(ctx, batch)
        prompts, candidates = stages.segment_prompts(ctx, batch, stages.generate_prompts(ctx, batch, probs))
        images = zip(samples, probs, stages.predict_auxiliary(ctx, batch), prompts, candidates, strict=True)
        for sample, p, auxiliary, *objects in images:
            beside = Beside(auxiliary, [batch.slices[i] for i in ctx.pool.neighbours(sample.sample_id)])
            for prompt, candidate in zip(*objects, strict=True):
                best = candidate.masks[candidate.best]
                evidence = collect_evidence(p, prompt, candidate, ctx.area_prior, beside)
                # Without a component the local model's mask is empty, as in the table of decisions.
                local = prompt.component if prompt.component is not None else np.zeros_like(best)
                yield {
                    "sample_id": sample.sample_id,
                    "group_id": task.labeled.group_of(sample.sample_id),
                    **evidence_row(evidence),
                    **_pixels(p, prompt, candidate, sample.mask, task.cfg.refine.min_vote),
                    "dice_segmenter": fit.true_dice(best, prompt, sample.mask),
                    "dice_local": fit.true_dice(local, prompt, sample.mask),
                }


def _pixels(probs: Probs, prompt: Prompts, candidate: Candidate, truth: NDArray[np.uint8], min_vote: float) -> Row:
    """`metrics.Correction` of the image by this object alone, if the segmenter's mask is used."""
    mask, _, outside = merge_objects(truth.shape, [(prompt, candidate, USED)], min_vote)
    return metrics.correction(probs.mask, np.where(outside, probs.mask, mask), truth)._asdict()
