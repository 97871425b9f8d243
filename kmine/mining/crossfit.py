"""Cross-fitting: local models trained without one fold of the labels, and their prompts for that fold.

Likewise models trained without the pseudo masks of one part of the unlabeled images, which predict that part: a model
is too sure of masks that it was trained on, and the gate could not tell the wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.mining.adaptation.finetune import Example
from kmine.mining.calibration.fit import MIN_OBJECTS
from kmine.mining.prompts import prompts_from_probs
from kmine.mining.pseudo_labels import PseudoLabels
from kmine.models.base import LocalModel
from kmine.ops.masks import components
from kmine.ops.seeding import derive_seed
from kmine.training.checkpoints import Checkpoints
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.rounds import trained_auxiliary_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import IGNORE_INDEX


def out_of_fold(task: Task, image_ids: Sequence[str]) -> Iterator[Example]:
    """Labeled images `image_ids` with prompts of local models trained without them, fold by fold.

    With fewer than two groups, or `adapt.folds` 1, there is no such model: the images come without prompts. Nor with
    fewer than `MIN_OBJECTS` objects, which calibrate no gate: their prompts alone are not worth the models (adapted
    with jittered true boxes instead, `tiny` mines as well: experiments/mining_engine, part `true_boxes`).
    """
    fold_ids = folds(task.labeled, task.cfg.adapt.folds, task.cfg.seed)
    if len(fold_ids) < 2 or num_objects(task.labeled) < MIN_OBJECTS:
        yield from ((task.labeled.sample(i), ()) for i in image_ids)
        return
    selected = set(image_ids)
    for fold_idx, held_out_ids in enumerate(fold_ids):
        ids = [i for i in held_out_ids if i in selected]
        if ids:
            yield from with_prompts(task, fold_model(task, fold_idx, held_out_ids), task.labeled, ids)


def num_objects(pool: Pool) -> int:
    """True objects of all classes, at training size."""
    masks = (pool.mask_resized(sample_id) for sample_id in pool.ids)
    pairs = ((mask, class_id) for mask in masks for class_id in np.unique(mask) if class_id not in (0, IGNORE_INDEX))
    return sum(len(components(mask == class_id)) for mask, class_id in pairs)


def unlabeled_parts(task: Task) -> list[list[str]]:
    """The unlabeled images in `crossfit` parts, by group; none where that leaves no two of them."""
    parts = folds(task.unlabeled, task.cfg.crossfit, task.cfg.seed)
    return parts if len(parts) > 1 else []


def train_parts(
    task: Task, model: LocalModel, starts: Sequence[Checkpoints], pseudo: PseudoLabels, round_idx: int
) -> list[Checkpoints]:
    """A model of each of the `unlabeled_parts`: trained for a round without pseudo masks of the part.

    `model` is trained in place, from the part's model of the last adopted round in `starts`.
    """
    trained = []
    for part, (held_out_ids, start) in enumerate(zip(unlabeled_parts(task), starts, strict=True)):
        held_out = set(held_out_ids)
        rest = pseudo.pool.subset([i for i in pseudo.pool.ids if i not in held_out])
        inputs = {"pseudo": rest if len(rest) else None, "pseudo_signature": sign(pseudo.signature, "part", rest.ids)}
        trained.append(train(task, model, round_idx=round_idx, start=start, method_dir=f"part_{part}", **inputs))
    return trained


def part_models(
    task: Task, student: Checkpoints, parts: Sequence[Checkpoints]
) -> tuple[tuple[frozenset[str], LocalModel], ...]:
    """`RoundContext.parts`; empty where the checkpoints of the parts are those of the student, as in round 1."""
    if all(part.signature == student.signature for part in parts):
        return ()
    models = [new_model(task) for _ in parts]
    for model, part in zip(models, parts, strict=True):
        model.load_state_dict(part.best)
    return tuple(zip(map(frozenset, unlabeled_parts(task)), models, strict=True))


def validation_examples(task: Task) -> list[Example]:
    """At most `adapt.max_images` validation images with prompts of the model of round 0."""
    model = new_model(task)
    model.load_state_dict(train(task, model, round_idx=0).best)
    return list(with_prompts(task, model, task.val, sample_ids(task.val, task.cfg.adapt.max_images, task.cfg.seed)))


def fold_model(task: Task, fold_idx: int, held_out_ids: Sequence[str]) -> LocalModel:
    """The local model trained on the labeled images without `held_out_ids`; read back if it was trained before."""
    model = new_model(task)
    model.load_state_dict(train(_without(task, held_out_ids), model, round_idx=0, method_dir=f"fold_{fold_idx}").best)
    return model


def fold_auxiliary_model(task: Task, fold_idx: int, held_out_ids: Sequence[str]) -> LocalModel | None:
    """The auxiliary model of a fold, as `fold_model`; None if the task has no auxiliary model."""
    rest = partial(_without, held_out_ids=held_out_ids)
    trained = trained_auxiliary_model(task, f"witness_fold_{fold_idx}", rest)
    return trained[0] if trained else None


def remaining_labels(task: Task, held_out_ids: Sequence[str]) -> Pool:
    """The labeled images without those held out."""
    held_out = set(held_out_ids)
    return task.labeled.subset([i for i in task.labeled.ids if i not in held_out])


def _without(task: Task, held_out_ids: Sequence[str]) -> Task:
    """The task of a fold model: the remaining labels, and at most `adapt.fold_steps` steps."""
    rest, steps = remaining_labels(task, held_out_ids), task.cfg.fit.steps
    cfg = replace(task.cfg, fit=replace(task.cfg.fit, steps=min(task.cfg.adapt.fold_steps or steps, steps)))
    return replace(task, cfg=cfg, labeled=rest, signature=sign(task.signature, "fold", rest.ids))


def folds(pool: Pool, num_folds: int, seed: int) -> list[list[str]]:
    """The ids of a pool in at most `num_folds` folds of about equal size; no group lies in two of them."""
    groups: dict[str, list[str]] = {}
    for sample_id in pool.ids:
        groups.setdefault(pool.group_of(sample_id), []).append(sample_id)
    names = sorted(groups)
    np.random.default_rng(derive_seed(seed, "folds")).shuffle(names)
    fold_ids: list[list[str]] = [[] for _ in range(min(num_folds, len(groups)))]
    for name in sorted(names, key=lambda name: -len(groups[name])):
        min(fold_ids, key=len).extend(groups[name])
    return fold_ids


def with_prompts(task: Task, model: LocalModel, pool: Pool, ids: Sequence[str]) -> Iterator[Example]:
    """Images with the prompts of mining, but without jittered boxes, which only the gate uses."""
    cfg = replace(task.cfg.prompts, num_jitters=0)
    for probs in infer(model, pool, ids, device=task.fabric.device, **asdict(task.cfg.infer)):
        yield pool.sample(probs.sample_id), prompts_from_probs(probs, cfg, seed=task.cfg.seed, round_idx=0)


def sample_ids(pool: Pool, count: int, seed: int) -> list[str]:
    """At most `count` random ids of a pool, in its order; images with an object are preferred."""
    ids = list(pool.ids)
    if len(ids) <= count:
        return ids
    order = np.random.default_rng(derive_seed(seed, "adapt", "images")).permutation(len(ids))
    # Most slices of a volume are empty and of little use here.
    objects = np.array([not np.isin(pool.mask_resized(i), (0, IGNORE_INDEX)).all() for i in ids])
    drawn = [*order[objects[order]], *order[~objects[order]]][:count]
    return [ids[i] for i in sorted(drawn)]
