"""Before round 1: what the local model's own masks can be estimated by, when nobody is asked.

The models of the parts are at hand, so this costs inference and nothing else. The gate does not read it: it is there
for `kmine predict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

import numpy as np

from kmine.io.files import sign
from kmine.mining.calibration.fit import fit_calibrator, reliability, true_dice
from kmine.mining.calibration.local_quality import LocalQualityEstimator, local_only, score_local_objects
from kmine.mining.candidates import median_object_area
from kmine.mining.crossfit import fold_model
from kmine.models.base import LocalModel
from kmine.ops.calibrator import FEATURES
from kmine.training.inference import infer
from kmine.training.task import Task
from kmine.types import Evidence

VERSION = 1
"""Of the rows: raised when the same models and images give others."""
Row = dict[str, Any]


def calibrate_local_quality(task: Task, fold_ids: Sequence[Sequence[str]]) -> Row | None:
    """What calibration.json has under `alone`; None where the objects are too few.

    Evidence and Dice of each part are artifacts of their own (`calibration/alone_N.json`), so those of the gate stay as
    they are, and a run from before this was measured only adds them. No segmenter is asked, and none signs them.

    Args:
        task: its local models of the parts are made, or read back.
        store: where artifacts go.
        fold_ids: the labeled ids of each.
    """
    cfg, prompts = task.cfg, local_only(task.cfg.prompts)
    settings = [asdict(section) for section in (cfg.model, cfg.classifier, prompts)]
    ttas = list(dict.fromkeys(("none", cfg.infer.tta)))  # as `kmine predict` does unless told, and as mining does
    signature = sign(
        "alone", VERSION, task.signature, cfg.fit.signed_fields(), settings, ttas, cfg.adapt.folds, cfg.adapt.fold_steps
    )
    rows: dict[str, list[Row]] = {tta: [] for tta in ttas}
    for fold_idx, held_out_ids in enumerate(fold_ids):
        path = task.run.root / "calibration" / f"alone_{fold_idx}.json"
        saved = task.run.load_json(path, signature)
        if saved is None:
            model = fold_model(task, fold_idx, held_out_ids)
            rest = task.labeled.subset([i for i in task.labeled.ids if i not in set(held_out_ids)])
            area_prior = median_object_area(rest, task.num_classes)
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
    """A calibrator of the objects' evidence, and how good it was on objects it was not fitted with; None: too few."""
    # Where nothing but ignored pixels is left, there is no Dice.
    rows = [row for row in rows if row["dice"] is not None]
    evidence = [Evidence(*(np.nan if row[name] is None else row[name] for name in FEATURES)) for row in rows]
    dice = np.array([row["dice"] for row in rows], float)
    fitted = fit_calibrator(evidence, dice, [row["group_id"] for row in rows], seed=seed)
    if fitted is None:
        return None
    calibrator, out_of_fold = fitted
    return {
        "calibrator": calibrator.to_json(),
        "num_objects": len(rows),
        "rank_correlation": rank_correlation(out_of_fold, dice),
        "mean": {"estimate": float(out_of_fold.mean()), "dice": float(dice.mean())},
        "reliability": reliability(out_of_fold, dice),
    }


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's; NaN where one of them is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def _rows(
    task: Task, model: LocalModel, ids: Sequence[str], area_prior: Mapping[int, float], tta: str
) -> Iterator[Row]:
    """One row an object that the model sees in images it does not know."""
    prompts, infer_settings = local_only(task.cfg.prompts), {**asdict(task.cfg.infer), "tta": tta}
    for probs in infer(model, task.labeled, ids, device=task.fabric.device, **infer_settings):
        sample = task.labeled.sample(probs.sample_id)
        for prompt, evidence in score_local_objects(probs, prompts, area_prior):
            dice = true_dice(prompt.component, prompt, sample.mask)
            yield {
                "sample_id": sample.sample_id,
                "group_id": task.labeled.group_of(sample.sample_id),
                **dict(zip(FEATURES, astuple(evidence), strict=True)),
                "dice": None if np.isnan(dice) else dice,
            }
