"""Masks recalled from memory (`prompts.source memory`): from labeled images, and through the slices of a volume.

A segmenter of the SAM 2 family finds an object again in an image after it was shown others with its mask. Few-shot
memory of labeled images is that of SSL-MedSAM2 (arXiv 2512.11548) in our reading; a prompted slice that propagates
through its volume is the use of SAM 2's video mode in MedSAM2 (arXiv 2504.03600).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kmine.data.pool import Pool
from kmine.mining.context import RoundContext
from kmine.mining.prompts import prompts_from_probs
from kmine.mining.segment import segment
from kmine.ops import masks
from kmine.segmenters.base import MemorySegmenter, Proposals, proposals_of
from kmine.training.inference import infer
from kmine.training.task import Task
from kmine.types import Bool, Prompts

MOST_SHOWN = 4
"""Labeled images with a class that are shown. Own choice: each costs an encoding for every image asked."""
Recalled = dict[str, list[Bool]]
"""(H, W) masks by sample id, classes mixed: the local model says which object is of which."""


class Memory:
    """Masks recalled for the images of a round; those of volumes are kept as run lengths, for pilot images come first.

    Args:
        labeled: images with masks, none of them among those that are asked.
        num_classes: background included.
    """

    def __init__(self, labeled: Pool, num_classes: int) -> None:
        self._labeled, self._num_classes, self._volumes = labeled, num_classes, dict[str, list[str]]()

    def proposals(self, ctx: RoundContext, ids: Sequence[str]) -> Iterator[Proposals]:
        """One `Proposals` for each image, in order: components of the masks that are recalled.

        A slice of a volume with further slices gets what propagates from the volume's clearest slice, other images what
        labeled images recall.
        """
        for sample_id in ids:
            volume = ctx.pool.volume_of(sample_id)
            if volume and sample_id not in self._volumes:
                self._volumes |= {i: [*map(masks.to_rle, found)] for i, found in propagated(ctx, volume).items()}
            shape, kept = ctx.pool.native_shape(sample_id), self._volumes.get(sample_id, ())
            found = [masks.from_rle(runs, *shape) for runs in kept] if volume else self._from_labels(ctx, sample_id)
            parts = [part for mask in found for part in masks.components(mask)]
            unknown = [float("nan")] * len(parts)
            yield proposals_of(shape, parts, unknown, unknown)

    def _from_labels(self, ctx: RoundContext, sample_id: str) -> list[Bool]:
        image = ctx.pool.unread(sample_id).image
        recalls = (_segmenter(ctx).recall(shown, [image], track=False) for shown in self._shown)
        return [mask for recalled in recalls for mask in recalled if mask.any()]

    @cached_property
    def _shown(self) -> list[list[tuple[NDArray[np.uint8], Bool]]]:
        """Images and masks of each class that occurs, evenly spaced over the labeled images with it."""
        shown = []
        for class_id in range(1, self._num_classes):
            ids = [i for i in self._labeled.ids if (self._labeled.mask_resized(i) == class_id).any()]
            samples = [self._labeled.sample(ids[n * len(ids) // MOST_SHOWN]) for n in range(MOST_SHOWN) if ids]
            pairs = {s.sample_id: (s.image, s.mask == class_id) for s in samples}
            shown += [list(pairs.values())] if pairs else []
        return shown


def memory_of(task: Task, labeled: Pool) -> Memory | None:
    """The memory with `prompts.source memory`, of the images `labeled`; None with other sources."""
    return Memory(labeled, task.num_classes) if task.cfg.prompts.source == "memory" else None


def propagated(ctx: RoundContext, ids: Sequence[str]) -> Recalled:
    """Masks in all slices `ids` of a volume, in order, from the slice of each class that shows it most clearly.

    That is the slice whose largest object has the largest sum of local probabilities; the segmenter's answer to its
    prompt is tracked to both ends of the volume. Without any object nothing is recalled.
    """
    recalled: Recalled = {i: [] for i in ids}
    for key, prompt in _clearest(ctx, ids).values():
        shown = ctx.pool.sample(key)
        candidate = segment(ctx.segmenter, [shown], [[prompt]], {})[0][0]
        mask = candidate.masks[candidate.best]
        if not mask.any():
            continue
        recalled[key].append(mask)
        place = list(ids).index(key)
        for way in (ids[place + 1 :], ids[:place][::-1]):
            frames = (ctx.pool.unread(i).image for i in way)
            found = _segmenter(ctx).recall([(shown.image, mask)], frames, track=True)
            for sample_id, own in zip(way, found, strict=True):
                recalled[sample_id] += [own] if own.any() else []
    return recalled


def _clearest(ctx: RoundContext, ids: Sequence[str]) -> dict[int, tuple[str, Prompts]]:
    """Per class, the slice with the clearest object, and its prompt."""
    cfg, settings = ctx.task.cfg, {"device": ctx.task.fabric.device, **asdict(ctx.task.cfg.infer)}
    best: dict[int, tuple[float, str, Prompts]] = {}
    for model, own in ctx.predicting(ids):
        for probs in infer(model, ctx.pool, own, **settings):
            for prompt in prompts_from_probs(probs, cfg.prompts, seed=cfg.seed, round_idx=ctx.round_idx):
                score = float(probs.probs[prompt.class_id][prompt.component].sum())
                if score > best.get(prompt.class_id, (0.0,))[0]:
                    best[prompt.class_id] = (score, probs.sample_id, prompt)
    return {class_id: (sample_id, prompt) for class_id, (_, sample_id, prompt) in best.items()}


def _segmenter(ctx: RoundContext) -> MemorySegmenter:
    assert isinstance(ctx.segmenter, MemorySegmenter), "checked when the segmenter was opened"
    return ctx.segmenter
