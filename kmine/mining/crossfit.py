"""Local models that were trained without a part of the labels, and what they say of that part (cross-fitting)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np

from kmine.data.pool import Pool
from kmine.io.files import sign
from kmine.mining.adaptation.finetune import Example
from kmine.mining.prompts import prompts_from_probs
from kmine.models.base import LocalModel
from kmine.seeding import derive_seed
from kmine.training.inference import infer
from kmine.training.model_setup import new_model
from kmine.training.rounds import trained_auxiliary_model
from kmine.training.task import Task
from kmine.training.trainer import train
from kmine.types import IGNORE_INDEX


def out_of_fold(task: Task, image_ids: Sequence[str]) -> Iterator[Example]:
    """The labeled images `image_ids` with prompts of local models that were trained without them, fold by fold.

    With fewer than two groups, or `adapt.folds` 1, no such model can be had: images come without prompts.
    """
    fold_ids = folds(task.labeled, task.cfg.adapt.folds, task.cfg.seed)
    if len(fold_ids) < 2:
        yield from ((task.labeled.sample(i), ()) for i in image_ids)
        return
    selected = set(image_ids)
    for fold_idx, held_out_ids in enumerate(fold_ids):
        ids = [i for i in held_out_ids if i in selected]
        if ids:
            yield from with_prompts(task, fold_model(task, fold_idx, held_out_ids), task.labeled, ids)


def fold_model(task: Task, fold_idx: int, held_out_ids: Sequence[str]) -> LocalModel:
    """The local model that was trained on all labeled images but those of `held_out_ids`; read back if it was before."""
    model = new_model(task)
    model.load_state_dict(train(_without(task, held_out_ids), model, round_idx=0, method_dir=f"fold_{fold_idx}").best)
    return model


def fold_auxiliary_model(task: Task, fold_idx: int, held_out_ids: Sequence[str]) -> LocalModel | None:
    """The same of the second local model, where there is one."""
    trained = trained_auxiliary_model(_without(task, held_out_ids), f"witness_fold_{fold_idx}")
    return trained[0] if trained else None


def _without(task: Task, held_out_ids: Sequence[str]) -> Task:
    """The task of a part's model: the other labels, and fewer steps."""
    held_out = set(held_out_ids)
    rest = task.labeled.subset([i for i in task.labeled.ids if i not in held_out])
    cfg = replace(task.cfg, fit=replace(task.cfg.fit, steps=min(task.cfg.adapt.fold_steps, task.cfg.fit.steps)))
    return replace(task, cfg=cfg, labeled=rest, signature=sign(task.signature, "fold", rest.ids))


def folds(pool: Pool, num_folds: int, seed: int) -> list[list[str]]:
    """The ids of a pool in at most `num_folds` parts of about equal size, no group in two of them."""
    groups: dict[str, list[str]] = {}
    for sample_id in pool.ids:
        groups.setdefault(pool.group_of(sample_id), []).append(sample_id)
    names = sorted(groups)
    np.random.default_rng(derive_seed(seed, "folds")).shuffle(names)
    parts: list[list[str]] = [[] for _ in range(min(num_folds, len(groups)))]
    for name in sorted(names, key=lambda name: -len(groups[name])):
        min(parts, key=len).extend(groups[name])
    return parts


def with_prompts(task: Task, model: LocalModel, pool: Pool, ids: Sequence[str]) -> Iterator[Example]:
    """Images with the prompts that mining would ask the segmenter."""
    cfg = replace(task.cfg.prompts, num_jitters=0)  # shaken boxes are evidence for the gate, nobody asks for it here
    for probs in infer(model, pool, ids, device=task.fabric.device, **asdict(task.cfg.infer)):
        yield pool.sample(probs.sample_id), prompts_from_probs(probs, cfg, seed=task.cfg.seed, round_idx=0)


def sample_ids(pool: Pool, count: int, seed: int) -> list[str]:
    """At most `count` ids of a pool, drawn by the seed; where there are more, those with an object come first."""
    ids = list(pool.ids)
    if len(ids) <= count:
        return ids
    order = np.random.default_rng(derive_seed(seed, "adapt", "images")).permutation(len(ids))
    # Most slices of a volume are empty: they would teach next to nothing in the place of others.
    objects = np.array([not np.isin(pool.mask_resized(i), (0, IGNORE_INDEX)).all() for i in ids])
    drawn = [*order[objects[order]], *order[~objects[order]]][:count]
    return [ids[i] for i in sorted(drawn)]
