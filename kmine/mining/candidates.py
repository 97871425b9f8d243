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
    blend_previous_mask,
    prompts_from_cam,
    prompts_from_mask,
    prompts_from_probs,
    reprompt_from_candidate,
)
from kmine.mining.proposals import has_foreground, match_proposals
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
from kmine.segmenters.base import AutomaticMaskGenerator, Segmenter, no_proposals_error
from kmine.training.inference import activations, infer
from kmine.training.task import StageTimer, Task
from kmine.types import (
    Candidate,
    Decision,
    Probs,
    Prompts,
    Sample,
)

PreviousMasks = dict[str, list[tuple[int, Callable[[], NDArray[np.bool_]]]]]
"""Class id and mask, unpacked when it is wanted, of the objects of each sample."""
BATCH_SIZE = 16
"""Images mined together: what a kill can cost, and what memory holds."""


class CandidateBatch(NamedTuple):
    """What is known of a chunk of images before the gate; one entry an image in each."""

    images: list[Sample]
    probs: list[Probs]
    prompts: list[list[Prompts]]
    candidates: list[list[Candidate]]
    auxiliary_probs: list[Probs | None]


def propose_candidates(
    task: Task,
    model: LocalModel,
    auxiliary_model: LocalModel | None,
    previous: PreviousMasks,
    round_idx: int,
    timer: StageTimer,
    ids: Sequence[str],
) -> CandidateBatch:
    """Images -> probs -> prompts -> candidates, of a chunk of unlabeled images."""
    images = [task.unlabeled.sample(i) for i in ids]
    timer.lap("read")
    probs = list(infer(model, task.unlabeled, ids, device=task.fabric.device, **asdict(task.cfg.infer)))
    timer.lap("infer")
    prompts, embedded = generate_prompts(task, task.segmenter, images, probs, round_idx)
    prompts = apply_image_labels(task, model, images, prompts, round_idx)
    prompts = [
        blend_previous_mask(image_prompts, previous.get(i, [])) for i, image_prompts in zip(ids, prompts, strict=True)
    ]
    timer.lap("prompts")
    prompts, candidates = segment_prompts(task, task.segmenter, images, prompts, round_idx, embedded)
    timer.lap("segment")
    auxiliary_probs = predict_auxiliary(task, auxiliary_model, task.unlabeled, ids)
    timer.lap("infer")
    return CandidateBatch(images, probs, prompts, candidates, auxiliary_probs)


def generate_prompts(
    task: Task, segmenter: Segmenter, images: Sequence[Sample], probs: Sequence[Probs], round_idx: int
) -> tuple[list[list[Prompts]], Embedded]:
    """What to ask about each image, and the embeddings that were made to find it out.

    The local model's own prompts; with `prompts.source auto` those of the masks that it picked among the segmenter's
    proposals. Nothing is proposed where it sees nothing, nor in images known to be free of the only thing sought.
    """
    cfg, seed = task.cfg.prompts, task.cfg.seed
    prompts = [prompts_from_probs(p, cfg, seed=seed, round_idx=round_idx) for p in probs]
    if cfg.source != "auto":
        return prompts, {}
    if not isinstance(segmenter, AutomaticMaskGenerator):
        raise no_proposals_error(segmenter.name)
    lesion_free = [image.image_label == 0 and task.num_classes == 2 for image in images]
    indices = [n for n, p in enumerate(probs) if not lesion_free[n] and has_foreground(p, prompts[n])]
    embedded = embed(segmenter, images, indices)
    for n, proposals in zip(indices, segmenter.propose([embedded[n] for n in indices]), strict=True):
        key = (seed, round_idx, images[n].sample_id)
        prompts[n] = [
            match.prompts
            if match.mask is None
            else prompts_from_mask(match.prompts, match.mask, cfg, seed=derive_seed(*key, k))
            for k, match in enumerate(match_proposals(probs[n], prompts[n], proposals, cfg))
        ]
    return prompts, embedded


def segment_prompts(
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

    def reprompt(image: int, number: int, prompt: Prompts, candidate: Candidate) -> Prompts:
        key = (task.cfg.seed, round_idx, images[image].sample_id, number, "second pass")
        return reprompt_from_candidate(prompt, candidate, cfg, seed=derive_seed(*key))

    return segment_twice(segmenter, images, prompts, reprompt, embedded)


def previous_masks(task: Task, round_idx: int) -> PreviousMasks:
    """The segmenter's masks of the round before, by sample, where the prompts are to remember them; else nothing."""
    previous: PreviousMasks = {}
    if task.cfg.prompts.source == "cascade" and round_idx > 1:
        for row in task.run.decisions(round_idx - 1):
            if row["object_idx"] >= 0:
                load_mask = partial(from_rle, row["segmenter_rle"], row["height"], row["width"])
                previous.setdefault(row["sample_id"], []).append((row["class_id"], load_mask))
    return previous


def apply_image_labels(
    task: Task, model: LocalModel, images: Sequence[Sample], prompts: Sequence[list[Prompts]], round_idx: int
) -> list[list[Prompts]]:
    """The prompts as the image-level labels leave them: none for lesions where there are none.

    Where there is one, but the model found none, the place where the classifier of sks looks is asked about.
    """
    cfg, lesion = task.cfg, task.num_classes - 1
    filtered = [
        [prompt for prompt in image_prompts if image.image_label != 0 or prompt.class_id != lesion]
        for image, image_prompts in zip(images, prompts, strict=True)
    ]
    if cfg.model.name != "sks" or not cfg.prompts.seed_from_activation:
        return filtered
    missed = {
        image.sample_id: image_prompts
        for image, image_prompts in zip(images, filtered, strict=True)
        if image.image_label == 1 and all(prompt.class_id != lesion for prompt in image_prompts)
    }
    maps = activations(model, task.unlabeled, list(missed), batch_size=cfg.infer.batch_size, device=task.fabric.device)
    for sample_id, activation in maps:
        key = {"sample_id": sample_id, "seed": cfg.seed, "round_idx": round_idx}
        missed[sample_id] += prompts_from_cam(activation, lesion, cfg.prompts, **key)
    return filtered


def median_object_area(labeled: Pool, num_classes: int) -> dict[int, float]:
    """Per class, the median share of the image that one labeled object covers; a class without objects has none."""
    areas: dict[int, list[float]] = {}
    for sample_id in labeled.ids:
        mask = labeled.mask_resized(sample_id)
        for class_id in range(1, num_classes):
            areas.setdefault(class_id, []).extend(float(c.mean()) for c in components(mask == class_id))
    return {class_id: float(np.median(shares)) for class_id, shares in areas.items() if shares}


def predict_auxiliary(
    task: Task, auxiliary_model: LocalModel | None, pool: Pool, ids: Sequence[str]
) -> list[Probs | None]:
    """What the second local model sees in each of the images; None where there is none."""
    if auxiliary_model is None:
        return [None for _ in ids]
    return list(infer(auxiliary_model, pool, ids, device=task.fabric.device, **asdict(task.cfg.infer)))


def gate_batch(
    batch: CandidateBatch, area_prior: dict[int, float], cfg: LoopConfig, calibration: Calibration | None = None
) -> list[list[Decision]]:
    """The gate's decision for each object of each image."""
    context = {"area_prior": area_prior, "cfg": cfg.gate, "calibration": calibration}
    return [
        [
            gate(p, prompt, candidate, image_label=image.image_label, auxiliary_probs=auxiliary_probs, **context)
            for prompt, candidate in zip(prompts, candidates, strict=True)
        ]
        for image, p, prompts, candidates, auxiliary_probs in zip(*batch, strict=True)
    ]


def refine_batch(
    batch: CandidateBatch, decisions: Sequence[Sequence[Decision]], cfg: RefineConfig
) -> list[NDArray[np.uint8] | None]:
    """The pseudo mask of each image, (H, W) uint8 class ids, 255 = ignore; None where it has none.

    See `kmine.mining.refine.refine`.
    """
    return [refine(*row, cfg, image_label=image.image_label) for image, *row in zip(*batch[:4], decisions, strict=True)]
