"""From a batch of images to the gate's decisions and pseudo-labels, one function per stage of mining.

Lists have one entry per image of the batch, and within it one per object; prompts, candidates and decisions of an image
are in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from kmine.config import DataConfig
from kmine.data.pool import Pool
from kmine.mining.context import ImageBatch, RoundContext
from kmine.mining.gate import Beside, gate
from kmine.mining.prompts import (
    blend_previous_mask,
    doubtful_prompts,
    place_of,
    prompts_from_cam,
    prompts_from_mask,
    prompts_from_probs,
    prompts_with_person,
)
from kmine.mining.proposals import has_foreground, match_proposals
from kmine.mining.refine import refine
from kmine.mining.segment import embed, segment, segment_twice
from kmine.ops.masks import components
from kmine.ops.seeding import derive_seed
from kmine.segmenters import needs_box
from kmine.segmenters.base import (
    AutomaticMaskGenerator,
    Proposals,
    abilities_of,
    no_proposals_error,
    without_missing,
)
from kmine.segmenters.embedding_cache import CachingSegmenter
from kmine.store.tables import DecisionRow
from kmine.training.inference import activations
from kmine.training.task import Task
from kmine.training.veto import infer_by_labels, is_vetoed
from kmine.types import Bool, Candidate, Decision, Probs, Prompts, PseudoLabel

PROPOSING = ("auto", "memory")
"""Values of `prompts.source` by which objects come from proposals."""


def read_batch(ctx: RoundContext, ids: Sequence[str], batch_idx: int = 0) -> ImageBatch:
    """Read the images `ids`, or their embeddings where these are on disk; those with a verdict are listed alone."""
    reviewed, segmenter = [i for i in ids if i in ctx.task.review], ctx.segmenter
    others = [i for i in ids if i not in reviewed]
    if not isinstance(segmenter, CachingSegmenter):
        return ImageBatch([ctx.pool.sample(i) for i in others], reviewed, batch_idx)
    images = [ctx.pool.unread(i) for i in others]
    stored = dict(enumerate(segmenter.stored(images)))
    for n, image in enumerate(images):
        _ = stored[n] or image.image  # decoded here, in a thread that reads ahead
    return ImageBatch(images, reviewed, batch_idx, {n: found for n, found in stored.items() if found})


def predict_probs(ctx: RoundContext, batch: ImageBatch) -> list[Probs]:
    """The local model's probabilities, of each image by the model of its part; the batch gets what else is found.

    That is which images are vetoed, and the masks of neighbouring slices, which may belong to another batch.
    """
    settings = {"device": ctx.task.fabric.device, **asdict(ctx.task.cfg.infer)}
    by_id: dict[str, Probs] = {}
    near = [i for sample_id in batch.ids for i in ctx.pool.neighbours(sample_id)]
    images = [*batch.images, *(ctx.pool.unread(i) for i in dict.fromkeys(near) if i not in batch.ids)]
    for model, ids in ctx.predicting([image.sample_id for image in images]):
        own = [image for image in images if image.sample_id in ids]
        probs = infer_by_labels(model, ctx.pool, own, **settings)
        batch.vetoed.update(p.sample_id for p in probs if is_vetoed(model, p) and p.sample_id in batch.ids)
        by_id |= {p.sample_id: p for p in probs}
    batch.slices.update((i, by_id[i].mask) for i in near)
    ctx.timer.lap("infer")
    return [by_id[i] for i in batch.ids]


def predict_auxiliary(ctx: RoundContext, batch: ImageBatch) -> list[Probs | None]:
    """Probabilities of the auxiliary model; None where there is no such model."""
    task = ctx.task
    if ctx.auxiliary_model is None:
        return [None] * len(batch.images)
    settings = {"device": task.fabric.device, **asdict(task.cfg.infer)}
    return infer_by_labels(ctx.auxiliary_model, ctx.pool, batch.images, **settings)


def generate_prompts(ctx: RoundContext, batch: ImageBatch, probs: Sequence[Probs]) -> list[list[Prompts]]:
    """Prompts for each object: from the local model's masks, or with `prompts.source auto` and memory from proposals.

    Those that a person drew come first, places of middling probability (`prompts.doubtful`) last. Image-level labels
    then remove or add prompts, and with `prompts.source cascade` mask inputs are blended with the segmenter's masks of
    the round before.
    """
    cfg, seed = ctx.task.cfg.prompts, ctx.task.cfg.seed
    prompts = [prompts_from_probs(p, cfg, seed=seed, round_idx=ctx.round_idx) for p in probs]
    found = [[(prompt.class_id, prompt.component) for prompt in of_image] for of_image in prompts]
    if cfg.source in PROPOSING:
        _use_proposals(ctx, batch, probs, prompts, found)
    _use_person(ctx, probs, prompts, found)
    for p, of_image, objects in zip(probs, prompts, found, strict=True):
        of_image += doubtful_prompts(p, objects, cfg, seed=seed, round_idx=ctx.round_idx)
    before = ((row for row in ctx.previous.get(i, ()) if row.is_object) for i in batch.ids)
    masks = ([(row.class_id, partial(row.mask, "segmenter")) for row in rows] for rows in before)
    return list(map(blend_previous_mask, apply_image_labels(ctx, batch, prompts), masks))


def prompts_need_networks(ctx: RoundContext) -> bool:
    """Whether `generate_prompts` may run a network: the segmenter's proposals, or activation maps of sks."""
    cfg = ctx.task.cfg
    return cfg.prompts.source in PROPOSING or (cfg.model.name == "sks" and cfg.prompts.seed_from_activation)


def _use_person(
    ctx: RoundContext, probs: Sequence[Probs], prompts: list[list[Prompts]], found: list[list[tuple[int, Bool]]]
) -> None:
    """Add a person's prompts to `prompts`, and their places to `found`, without what the segmenter does not take."""
    task, able = ctx.task, abilities_of(ctx.segmenter)
    for n, p in enumerate(probs):
        drawn = task.person.by_sample.get(p.sample_id, ())
        if not drawn:
            continue
        found[n] += [(own.class_id, place_of(own, p.mask)) for own in drawn]
        key = {"seed": task.cfg.seed, "round_idx": ctx.round_idx}
        added = prompts_with_person(p, prompts[n], drawn, task.cfg.prompts, **key)
        fitting = (without_missing(own, able) for own in added)
        prompts[n] = [own for own in fitting if own.box is not None or not needs_box(ctx.segmenter)]


def _use_proposals(
    ctx: RoundContext,
    batch: ImageBatch,
    probs: Sequence[Probs],
    prompts: list[list[Prompts]],
    found: list[list[tuple[int, Bool]]],
) -> None:
    """Replace `prompts` by those of the segmenter's proposals that the local model matches, and add these to `found`.

    Nothing is proposed where the local model sees nothing, nor in images known to be free of the only class.
    """
    task = ctx.task
    lesion_free = [image.image_label == 0 and task.num_classes == 2 for image in batch.images]
    indices = [n for n, p in enumerate(probs) if not lesion_free[n] and has_foreground(p, prompts[n], task.cfg.prompts)]
    for n, proposals in zip(indices, _proposals(ctx, batch, indices), strict=True):
        key = (task.cfg.seed, ctx.round_idx, batch.images[n].sample_id)
        matches = match_proposals(probs[n], prompts[n], proposals, task.cfg.prompts)
        found[n] += [(own.class_id, mask) for own, mask in matches if mask is not None]
        prompts[n] = [
            own if mask is None else prompts_from_mask(own, mask, task.cfg.prompts, seed=derive_seed(*key, k))
            for k, (own, mask) in enumerate(matches)
        ]


def _proposals(ctx: RoundContext, batch: ImageBatch, indices: Sequence[int]) -> Iterator[Proposals]:
    """Proposals for the images of the batch with these indices, from memory or by the segmenter's own generator."""
    if ctx.memory:
        return ctx.memory.proposals(ctx, [batch.images[n].sample_id for n in indices])
    if not isinstance(ctx.segmenter, AutomaticMaskGenerator):
        raise no_proposals_error(ctx.segmenter.name)
    return ctx.segmenter.propose(list(embed(ctx.segmenter, batch.images, indices, batch.embedded).values()))


def apply_image_labels(ctx: RoundContext, batch: ImageBatch, prompts: Sequence[list[Prompts]]) -> list[list[Prompts]]:
    """Remove prompts for lesions from images labeled lesion-free; the lesion is the last class.

    With sks and `prompts.seed_from_activation`, an image labeled with a lesion of which the local model finds none gets
    a prompt from the classifier's activation map.
    """
    cfg, lesion = ctx.task.cfg, ctx.task.num_classes - 1
    filtered = [
        [prompt for prompt in image_prompts if image.image_label != 0 or prompt.class_id != lesion]
        for image, image_prompts in zip(batch.images, prompts, strict=True)
    ]
    if cfg.model.name != "sks" or not cfg.prompts.seed_from_activation:
        return filtered
    missed = {
        image.sample_id: image_prompts
        for image, image_prompts in zip(batch.images, filtered, strict=True)
        if image.image_label == 1 and all(prompt.class_id != lesion for prompt in image_prompts)
    }
    settings = {"batch_size": cfg.infer.batch_size, "device": ctx.task.fabric.device}
    for model, ids in ctx.predicting(list(missed)):
        for sample_id, activation in activations(model, ctx.pool, ids, **settings):
            key = {"sample_id": sample_id, "seed": cfg.seed, "round_idx": ctx.round_idx}
            missed[sample_id] += prompts_from_cam(activation, lesion, cfg.prompts, **key)
    return filtered


def segment_prompts(
    ctx: RoundContext, batch: ImageBatch, prompts: Sequence[list[Prompts]]
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """The segmenter's candidates and the prompts that they belong to.

    With `prompts.passes 2`, the candidates of a first pass become the prompts of a second one.
    """
    cfg, seed = ctx.task.cfg.prompts, ctx.task.cfg.seed

    def reprompt(image: int, number: int, prompt: Prompts, candidate: Candidate) -> Prompts:
        key = (seed, ctx.round_idx, batch.images[image].sample_id, number, "second pass")
        return prompts_from_mask(prompt, candidate.masks[candidate.best], cfg, seed=derive_seed(*key))

    if cfg.passes == 1:
        prompts, candidates = list(prompts), segment(ctx.segmenter, batch.images, prompts, batch.embedded)
    else:
        prompts, candidates = segment_twice(ctx.segmenter, batch.images, prompts, reprompt, batch.embedded)
    ctx.timer.lap("segment")
    return prompts, candidates


def gate_batch(
    ctx: RoundContext,
    batch: ImageBatch,
    probs: Sequence[Probs],
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    auxiliary_probs: Sequence[Probs | None],
) -> list[list[Decision]]:
    """The gate's decision on each object; agreement with auxiliary model and neighbouring slices is evidence, too."""
    settings = {"area_prior": ctx.area_prior, "cfg": ctx.task.cfg.gate, "calibration": ctx.calibration}
    lesion, decisions = ctx.task.num_classes - 1, []
    for image, p, auxiliary, *objects in zip(batch.images, probs, auxiliary_probs, prompts, candidates, strict=True):
        beside = Beside(auxiliary, [batch.slices[i] for i in ctx.pool.neighbours(image.sample_id)])
        label_of = {lesion: image.image_label}  # of other classes an image-level label says nothing
        decisions.append(
            [
                gate(p, prompt, candidate, image_label=label_of.get(prompt.class_id), beside=beside, **settings)
                for prompt, candidate in zip(*objects, strict=True)
            ]
        )
    return decisions


def refine_batch(
    ctx: RoundContext,
    batch: ImageBatch,
    probs: Sequence[Probs],
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    decisions: Sequence[Sequence[Decision]],
) -> list[PseudoLabel | None]:
    """The pseudo-label of each image; None where no object was kept. See `kmine.mining.refine.refine`."""
    labels = [
        refine(*stages, ctx.task.cfg.refine, image_label=image.image_label)
        for image, *stages in zip(batch.images, probs, prompts, candidates, decisions, strict=True)
    ]
    return [label and replace(label, signature=ctx.signature, round_idx=ctx.round_idx) for label in labels]


def previous_masks(task: Task, round_idx: int) -> Mapping[str, Sequence[DecisionRow]]:
    """Decisions of the round before with the segmenter's masks, with `prompts.source cascade`; else none."""
    is_used = task.cfg.prompts.source == "cascade" and round_idx > 1
    return task.run.by_sample(round_idx - 1)[0] if is_used else {}


def median_object_area(labeled: Pool, num_classes: int) -> dict[int, float]:
    """Per class, the median share of the image that one labeled object covers; classes without objects are left out.

    What surrounds a letterboxed image is no part of it.
    """
    areas: dict[int, list[float]] = {}
    for sample_id in labeled.ids:
        mask, size = labeled.mask_resized(sample_id), np.count_nonzero(labeled.blank_mask(sample_id) == 0)
        for class_id in range(1, num_classes):
            areas.setdefault(class_id, []).extend(int(c.sum()) / size for c in components(mask == class_id))
    return {class_id: float(np.median(shares)) for class_id, shares in areas.items() if shares}


def sign_areas(cfg: DataConfig) -> list[str]:
    """What `median_object_area` adds to signatures: older letterboxed runs counted what surrounds the image."""
    return ["area without the rim"] if cfg.resize == "letterbox" else []
