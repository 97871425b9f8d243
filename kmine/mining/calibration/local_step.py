"""Before round 1: calibrate quality estimation for the local model's own masks, without a segmenter.

It reuses the fold models, so it costs only inference. Only `kmine predict` reads it, the gate does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import fit_calibrator, rank_correlation, reliability, true_dice
from kmine.mining.calibration.local_quality import LocalQualityEstimator, local_only, score_local_objects
from kmine.mining.candidates import median_object_area, sign_areas
from kmine.mining.crossfit import fold_model, remaining_labels
from kmine.models.base import LocalModel
from kmine.ops.calibrator import evidence_from_row, evidence_row
from kmine.store.settings import signed, signed_sections
from kmine.training.inference import infer
from kmine.training.task import Task

VERSION = 1
"""Version of the rows: raised when the same models and images yield other ones."""
Row = dict[str, Any]


def calibrate_local_quality(task: Task, fold_ids: Sequence[Sequence[str]]) -> Row | None:
    """Content of `alone` in calibration.json; None with too few objects.

    Evidence and Dice of each fold (labeled `fold_ids`) are separate artifacts (`calibration/alone_N.json`), signed
    without the segmenter. An older run that lacks them keeps its other files.
    """
    cfg, prompts = task.cfg, local_only(task.cfg.prompts)
    settings = [*signed_sections(cfg, "model", "classifier"), signed("prompts", prompts), *sign_areas(cfg.data)]
    ttas = list(dict.fromkeys(("none", cfg.infer.tta)))  # the default of `kmine predict`, and that of mining
    fold_settings = (cfg.adapt.folds, cfg.adapt.fold_steps)
    fit_settings = signed("fit", cfg.fit.signed_fields())
    signature = sign("alone", VERSION, task.signature, fit_settings, settings, ttas, *fold_settings)
    rows: dict[str, list[Row]] = {tta: [] for tta in ttas}
    for fold_idx, held_out_ids in enumerate(fold_ids):
        path = task.run.root / "calibration" / f"alone_{fold_idx}.json"
        saved = task.run.load_json(path, signature)
        if saved is None:
            model = fold_model(task, fold_idx, held_out_ids)
            area_prior = median_object_area(remaining_labels(task, held_out_ids), task.num_classes)
            saved = {"objects": {tta: list(_rows(task, model, held_out_ids, area_prior, tta)) for tta in ttas}}
            task.run.save_json(path, saved, signature)
        for tta in ttas:
            rows[tta] += saved["objects"][tta]
    by_tta = {tta: fitted for tta in ttas if (fitted := fit_local_calibrator(rows[tta], cfg.seed))}
    if not by_tta:
        return None
    record = LocalQualityEstimator({}, median_object_area(task.labeled, task.num_classes), prompts).to_json()
    return record | {"num_parts": len(fold_ids), "by_tta": by_tta}


def fit_local_calibrator(rows: Sequence[Row], seed: int) -> Row | None:
    """A calibrator of the objects' evidence, with its out-of-fold quality; None with too few objects."""
    dice = np.array([row["dice"] for row in rows], float)
    fitted = fit_calibrator(list(map(evidence_from_row, rows)), dice, [row["group_id"] for row in rows], seed=seed)
    if fitted is None:
        return None
    return {
        "calibrator": fitted.calibrator.to_json(),
        "num_objects": len(rows),
        "rank_correlation": rank_correlation(fitted.out_of_fold, dice),
        "mean": {"estimate": float(fitted.out_of_fold.mean()), "dice": float(dice.mean())},
        "reliability": reliability(fitted.out_of_fold, dice),
    }


def _rows(
    task: Task, model: LocalModel, ids: Sequence[str], area_prior: Mapping[int, float], tta: str
) -> Iterator[Row]:
    """One row per object that the model finds in images on which it was not trained."""
    prompts, infer_settings = local_only(task.cfg.prompts), {**asdict(task.cfg.infer), "tta": tta}
    for probs in infer(model, task.labeled, ids, device=task.fabric.device, **infer_settings):
        sample = task.labeled.sample(probs.sample_id)
        origin = {"sample_id": sample.sample_id, "group_id": task.labeled.group_of(sample.sample_id)}
        for prompt, evidence in score_local_objects(probs, prompts, area_prior):
            yield {**origin, **evidence_row(evidence), "dice": true_dice(prompt.component, prompt, sample.mask)}
