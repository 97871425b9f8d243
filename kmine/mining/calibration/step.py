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
    fit_calibrator,
    promise,
    reliability,
    risk_coverage,
    true_dice,
)
from kmine.mining.calibration.local_step import calibrate_alone, rank_correlation
from kmine.mining.candidates import (
    CHUNK,
    ask,
    object_areas,
    prompts_for,
    witnessed,
)
from kmine.mining.crossfit import (
    fold_model,
    fold_witness,
    folds,
    prompted,
    some_of,
)
from kmine.mining.gate import gather
from kmine.models.base import LocalModel
from kmine.ops.calibrator import FEATURES, Calibration, Promise
from kmine.ops.masks import components
from kmine.segmenters.base import ADAPTED, Adaptable, Segmenter
from kmine.store.run_folder import RunStore
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import IGNORE_INDEX, Evidence, Sample

Row = dict[str, Any]


def calibrate(task: Task, base: Segmenter | None, store: RunStore) -> Task:
    """The task with its gate calibrated, where the labels are enough for that; the same task otherwise.

    Evidence and Dice of each part (`calibration/fold_N.json`) and what was learnt from them
    (`calibration/calibration.json`) are artifacts of the run, read back where they were made from the same. Beside it
    stands what the local model's own masks can be estimated by (`calibrate_alone`), which decides nothing here.

    Args:
        task: with the segmenter as it will mine.
        base: the segmenter as it was before it learnt from the labels; the parts' own are made from it.
        store: where artifacts go.
    """
    cfg = task.cfg
    if task.segmenter is None or base is None or cfg.gate.mode != "calibrated":
        return task
    parts = folds(task.labeled, cfg.adapt.folds, cfg.seed)
    fit_settings = {k: v for k, v in asdict(cfg.fit).items() if k not in ("num_workers", "round_steps", "round_lr")}
    settings = [asdict(part) for part in (cfg.model, cfg.classifier, cfg.infer, cfg.prompts, cfg.adapt)]
    settings.append(asdict(task.witness) if task.witness else {})
    made_from = sign(task.signature, task.segmenter.signature, fit_settings, settings)
    if (count := _num_objects(task.labeled)) < MIN_OBJECTS or len(parts) < 2:
        # Hardly more could be found than there are: nobody need be trained to see that.
        about: Row = {"num_objects": count, "num_parts": len(parts), "promise": None, "alone": None}
    else:
        rows = list(_all_rows(task, base, store, parts, made_from))
        about = learn(rows, cfg.gate.target_dice, cfg.gate.confidence, cfg.gate.margin, cfg.seed)
        about["alone"] = calibrate_alone(task, store, parts)
    store.save_json(store.root / "calibration" / "calibration.json", about, made_from)
    task.watcher.say(sentence(about))
    return replace(task, calibration=Calibration.from_json(about) if about["promise"] else None)


def _num_objects(pool: Pool) -> int:
    """True objects of all classes, at the size of training."""
    masks = (pool.mask_resized(sample_id) for sample_id in pool.ids)
    return sum(
        len(components(mask == class_id))
        for mask in masks
        for class_id in np.unique(mask)
        if class_id not in (0, IGNORE_INDEX)
    )


def learn(rows: Sequence[Row], target: float, confidence: float, margin: float, seed: int) -> Row:
    """Content of calibration.json from the objects' evidence and Dice; `promise` is None where they are too few."""
    # Where nothing but ignored pixels is left, there is no Dice.
    rows = [row for row in rows if row["dice_segmenter"] is not None and row["dice_local"] is not None]
    about = {"target": target, "confidence": confidence, "num_objects": len(rows)}
    evidence = [Evidence(*(_number(row[name]) for name in FEATURES)) for row in rows]
    groups = [row["group_id"] for row in rows]
    dice = {name: np.array([row[f"dice_{name}"] for row in rows], float) for name in ("segmenter", "local")}
    fitted = {name: fit_calibrator(evidence, dice[name], groups, seed=seed) for name in dice}
    if fitted["segmenter"] is None or fitted["local"] is None:
        return about | {"promise": None}
    (of_segmenter, answer), (of_local, local) = fitted["segmenter"], fitted["local"]
    # The same choice as the gate's, on estimates made without the object.
    takes_local = local >= answer + margin
    estimates, truth = np.where(takes_local, local, answer), np.where(takes_local, dice["local"], dice["segmenter"])
    found = promise(estimates, truth, target=target, confidence=confidence)
    return about | {
        **Calibration(of_segmenter, of_local, found).to_json(),
        "rank_correlation": rank_correlation(estimates, truth),
        "mean_dice": {name: float(values.mean()) for name, values in dice.items()},
        "risk_coverage": risk_coverage(estimates, truth),
        "reliability": reliability(estimates, truth),
    }


def sentence(about: Row) -> str:
    """What came of the calibration, in one sentence; `about` is the content of calibration.json."""
    if about.get("num_parts", 2) < 2:
        return (
            "the gate is not calibrated: with adapt.folds 1, or a single group, no labeled image is unknown to the "
            "models that would be asked; its thresholds decide"
        )
    if not about["promise"]:
        return (
            f"the gate is not calibrated: {about['num_objects']} objects of labeled images are too few; "
            "its thresholds decide"
        )
    p = Promise.from_json(about["promise"])
    wanted = f"a mean Dice of {about['target']:.2f} at {about['confidence']:.0%}"
    at = f"masks from estimated Dice {p.threshold:.2f} on ({p.coverage:.0%} of {p.num_objects} labeled objects)"
    if p.kept:
        return f"the gate keeps {at} and promises {wanted} confidence (bound {p.lower_bound:.2f}, seen {p.mean:.2f})"
    instead = f"Each round keeps as many masks as have a mean estimate of {about['target']:.2f}"
    if not p.coverage:
        return (
            f"{wanted} confidence cannot be promised: none of {p.num_objects} labeled objects reaches an estimated "
            f"Dice of {p.threshold:.2f}. {instead}"
        )
    return (
        f"not enough labels to promise {wanted} confidence; {p.lower_bound:.2f} can be promised for {at}, where "
        f"{p.mean:.2f} was seen. {instead}"
    )


def _all_rows(
    task: Task, base: Segmenter, store: RunStore, parts: Sequence[Sequence[str]], made_from: str
) -> Iterator[Row]:
    paths = [store.root / "calibration" / f"fold_{n}.json" for n in range(len(parts))]
    known = [store.load_json(path, made_from) for path in paths]
    if None in known:
        known = _measure(task, base, store, parts, known)
        for path, part in zip(paths, known, strict=True):
            store.save_json(path, part, made_from)
    for part in known:
        yield from part["objects"]


def _measure(
    task: Task, base: Segmenter, store: RunStore, parts: Sequence[Sequence[str]], known: Sequence[Row | None]
) -> list[Row]:
    """Evidence and Dice of the objects found in each part, by models that do not know it."""
    cfg = task.cfg
    wanted = set(some_of(task.labeled, cfg.adapt.max_images, cfg.seed))
    examples, models, witnesses = [], [], []
    for number, part in enumerate(parts):
        models.append(fold_model(task, store, number, part))
        witnesses.append(fold_witness(task, store, number, part))
        examples.append(list(prompted(task, models[-1], task.labeled, [i for i in part if i in wanted])))
    held_out = _held_out(task, store)
    out = []
    for number, part in enumerate(parts):
        if known[number] is not None:
            out.append(known[number])
            continue
        others = [example for n, some in enumerate(examples) if n != number for example in some]
        title = f"calibrating the gate: part {number + 1} of {len(parts)}"
        segmenter = _taught(task, base, others, held_out, title)
        rest = task.labeled.subset([i for i in task.labeled.ids if i not in set(part)])
        areas = object_areas(rest, task.num_classes)
        out.append({"objects": list(_mined(task, models[number], witnesses[number], segmenter, part, areas))})
    return out


def _held_out(task: Task, store: RunStore) -> list[Example]:
    if not task.segmenter.name.endswith(ADAPTED):
        return []
    model = new_model(task, store)
    model.load_state_dict(train(task, store, model, round_idx=0).best)
    return list(prompted(task, model, task.val, some_of(task.val, task.cfg.adapt.max_images, task.cfg.seed)))


def _taught(
    task: Task, base: Segmenter, examples: Sequence[Example], held_out: Sequence[Example], title: str
) -> Segmenter:
    """The segmenter as it would mine, had it been taught with `examples` alone."""
    if not (task.segmenter.name.endswith(ADAPTED) and isinstance(base, Adaptable)):
        return base
    task.watcher.start(title, task.cfg.adapt.steps or base.adapt_plan.steps)
    return adapt(
        base,
        examples,
        held_out,
        task.cfg.adapt,
        seed=task.cfg.seed,
        progress=lambda done, loss, iou: task.watcher.advance(done),
    ).segmenter


def _mined(
    task: Task,
    model: LocalModel,
    witness: LocalModel | None,
    segmenter: Segmenter,
    ids: Sequence[str],
    areas: dict[int, float],
) -> Iterator[Row]:
    """One row an object, as mining would find it in images of which nothing is known."""
    cfg = task.cfg
    for first in range(0, len(ids), CHUNK):
        some = ids[first : first + CHUNK]
        samples = [task.labeled.sample(i) for i in some]
        probs = list(infer(model, task.labeled, some, device=task.fabric.device, **asdict(cfg.infer)))
        unseen: list[Sample] = [replace(sample, mask=None, image_label=None) for sample in samples]
        prompts, embedded = prompts_for(task, segmenter, unseen, probs, 0)
        prompts, answers = ask(task, segmenter, unseen, prompts, 0, embedded)
        also = witnessed(task, witness, task.labeled, some)
        for sample, p, asked, found, seen in zip(samples, probs, prompts, answers, also, strict=True):
            for one, candidate in zip(asked, found, strict=True):
                best = candidate.masks[candidate.best]
                # Where the local model has no object of its own, its mask of it is empty, as in the decisions.
                local = one.component if one.component is not None else np.zeros_like(best)
                yield {
                    "sample_id": sample.sample_id,
                    "group_id": task.labeled.group_of(sample.sample_id),
                    **dict(zip(FEATURES, astuple(gather(p, one, candidate, areas, seen)), strict=True)),
                    "dice_segmenter": _known(true_dice(best, one, sample.mask)),
                    "dice_local": _known(true_dice(local, one, sample.mask)),
                }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
