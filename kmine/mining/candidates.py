"""From images to the gate's decisions: what the segmenter is asked about unlabeled images, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.config import LoopConfig, RefineConfig
from kmine.data.pool import Pool
from kmine.mining.gate import gate
from kmine.mining.prompts import (
    ask_about,
    ask_again,
    find_prompts,
    prompts_from_activation,
    remember,
)
from kmine.mining.proposals import may_pick, pick
from kmine.mining.refine import refine
from kmine.mining.segment import (
    Embedded,
    embed,
    segment,
    segment_twice,
)
from kmine.models.base import LocalModel
from kmine.ops.calibrator import Calibration
from kmine.ops.masks import components, from_rle
from kmine.seeding import derive_seed
from kmine.segmenters.base import Proposing, Segmenter, cannot_propose
from kmine.store.run_folder import RunStore
from kmine.training.inference import activations, infer
from kmine.training.task import Clock, Task
from kmine.types import (
    Candidate,
    Decision,
    Probs,
    Prompts,
    Sample,
)

Known = dict[str, list[tuple[int, Callable[[], NDArray[np.bool_]]]]]
"""Class id and mask, unpacked when it is wanted, of the objects of each sample."""
CHUNK = 16
"""Images mined together: what a kill can cost, and what memory holds."""


class Asked(NamedTuple):
    """What is known of a chunk of images before the gate; one entry an image in each."""

    images: list[Sample]
    probs: list[Probs]
    prompts: list[list[Prompts]]
    candidates: list[list[Candidate]]
    witnessed: list[Probs | None]


def ask_about_images(
    task: Task,
    model: LocalModel,
    witness: LocalModel | None,
    known: Known,
    round_idx: int,
    clock: Clock,
    ids: Sequence[str],
) -> Asked:
    """Images -> probs -> prompts -> candidates, of a chunk of unlabeled images."""
    images = [task.unlabeled.sample(i) for i in ids]
    clock.lap("read")
    probs = list(infer(model, task.unlabeled, ids, device=task.fabric.device, **asdict(task.cfg.infer)))
    clock.lap("infer")
    prompts, embedded = prompts_for(task, task.segmenter, images, probs, round_idx)
    prompts = heed_labels(task, model, images, prompts, round_idx)
    prompts = [remember(asked, known.get(i, [])) for i, asked in zip(ids, prompts, strict=True)]
    clock.lap("prompts")
    prompts, candidates = ask(task, task.segmenter, images, prompts, round_idx, embedded)
    clock.lap("segment")
    seen = witnessed(task, witness, task.unlabeled, ids)
    clock.lap("infer")
    return Asked(images, probs, prompts, candidates, seen)


def prompts_for(
    task: Task, segmenter: Segmenter, images: Sequence[Sample], probs: Sequence[Probs], round_idx: int
) -> tuple[list[list[Prompts]], Embedded]:
    """What to ask about each image, and the embeddings that were made to find it out.

    The local model's own prompts; with `prompts.source auto` those of the masks that it picked among the segmenter's
    proposals. Nothing is proposed where it sees nothing, nor in images known to be free of the only thing sought.
    """
    cfg, seed = task.cfg.prompts, task.cfg.seed
    prompts = [find_prompts(p, cfg, seed=seed, round_idx=round_idx) for p in probs]
    if cfg.source != "auto":
        return prompts, {}
    if not isinstance(segmenter, Proposing):
        raise cannot_propose(segmenter.name)
    free = [image.image_label == 0 and task.num_classes == 2 for image in images]
    wanted = [n for n, p in enumerate(probs) if not free[n] and may_pick(p, prompts[n])]
    embedded = embed(segmenter, images, wanted)
    for n, proposals in zip(wanted, segmenter.propose([embedded[n] for n in wanted]), strict=True):
        key = (seed, round_idx, images[n].sample_id)
        prompts[n] = [
            one.asked if one.mask is None else ask_about(one.asked, one.mask, cfg, seed=derive_seed(*key, k))
            for k, one in enumerate(pick(probs[n], prompts[n], proposals, cfg))
        ]
    return prompts, embedded


def ask(
    task: Task,
    segmenter: Segmenter,
    images: Sequence[Sample],
    prompts: Sequence[list[Prompts]],
    round_idx: int,
    embedded: Embedded | None = None,
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """What the segmenter answers, and to which prompts: in one pass, or with its own answers in a second one.

    `embedded` are embeddings that are there already; these images are not encoded again.
    """
    cfg = task.cfg.prompts
    if cfg.passes == 1:
        return list(prompts), segment(segmenter, images, prompts, embedded)

    def again(image: int, number: int, asked: Prompts, answer: Candidate) -> Prompts:
        key = (task.cfg.seed, round_idx, images[image].sample_id, number, "second pass")
        return ask_again(asked, answer, cfg, seed=derive_seed(*key))

    return segment_twice(segmenter, images, prompts, again, embedded)


def answered_before(task: Task, store: RunStore, round_idx: int) -> Known:
    """The segmenter's masks of the round before, by sample, where the prompts are to remember them; else nothing."""
    known: Known = {}
    if task.cfg.prompts.source == "cascade" and round_idx > 1:
        for row in store.decisions(round_idx - 1):
            if row["object_idx"] >= 0:
                answer = partial(from_rle, row["segmenter_rle"], row["height"], row["width"])
                known.setdefault(row["sample_id"], []).append((row["class_id"], answer))
    return known


def heed_labels(
    task: Task, model: LocalModel, images: Sequence[Sample], prompts: Sequence[list[Prompts]], round_idx: int
) -> list[list[Prompts]]:
    """The prompts as the image-level labels leave them: none for lesions where there are none.

    Where there is one, but the model found none, the place where the classifier of sks looks is asked about.
    """
    cfg, lesion = task.cfg, task.num_classes - 1
    heeded = [
        [one for one in asked if image.image_label != 0 or one.class_id != lesion]
        for image, asked in zip(images, prompts, strict=True)
    ]
    if cfg.model.name != "sks" or not cfg.prompts.seed_from_activation:
        return heeded
    missed = {
        image.sample_id: asked
        for image, asked in zip(images, heeded, strict=True)
        if image.image_label == 1 and all(one.class_id != lesion for one in asked)
    }
    maps = activations(model, task.unlabeled, list(missed), batch_size=cfg.infer.batch_size, device=task.fabric.device)
    for sample_id, activation in maps:
        key = {"sample_id": sample_id, "seed": cfg.seed, "round_idx": round_idx}
        missed[sample_id] += prompts_from_activation(activation, lesion, cfg.prompts, **key)
    return heeded


def object_areas(labeled: Pool, num_classes: int) -> dict[int, float]:
    """Per class, the median share of the image that one labeled object covers; a class without objects has none."""
    areas: dict[int, list[float]] = {}
    for sample_id in labeled.ids:
        mask = labeled.mask_resized(sample_id)
        for class_id in range(1, num_classes):
            areas.setdefault(class_id, []).extend(float(c.mean()) for c in components(mask == class_id))
    return {class_id: float(np.median(found)) for class_id, found in areas.items() if found}


def witnessed(task: Task, witness: LocalModel | None, pool: Pool, ids: Sequence[str]) -> list[Probs | None]:
    """What the second local model sees in each of the images; None where there is none."""
    if witness is None:
        return [None for _ in ids]
    return list(infer(witness, pool, ids, device=task.fabric.device, **asdict(task.cfg.infer)))


def gate_all(
    asked: Asked, labeled_area: dict[int, float], cfg: LoopConfig, calibration: Calibration | None = None
) -> list[list[Decision]]:
    """The gate's decision for each object of each image."""
    how = {"labeled_area": labeled_area, "cfg": cfg.gate, "calibration": calibration}
    return [
        [
            gate(p, prompt, answer, image_label=image.image_label, witness=seen, **how)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for image, p, prompts, answers, seen in zip(*asked, strict=True)
    ]


def refine_all(
    asked: Asked, decisions: Sequence[Sequence[Decision]], cfg: RefineConfig
) -> list[NDArray[np.uint8] | None]:
    """The pseudo mask of each image, (H, W) uint8 class ids, 255 = ignore; None where it has none.

    See `kmine.mining.refine.refine`.
    """
    return [refine(*row, cfg, image_label=image.image_label) for image, *row in zip(*asked[:4], decisions, strict=True)]
