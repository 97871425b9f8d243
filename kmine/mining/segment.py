"""Prompts to candidates: run the promptable segmenter on a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from kmine.data.pool import UnreadSample
from kmine.ops import masks, metrics
from kmine.segmenters.base import Embedding, Segmenter
from kmine.types import Candidate, Prompts, Sample

Embedded = dict[int, Embedding]
"""Embeddings by index of the image, for the images encoded so far."""


def embed(
    segmenter: Segmenter, samples: Sequence[Sample | UnreadSample], indices: Iterable[int], embedded: Embedded
) -> Embedded:
    """Embeddings of the images `indices`, in that order; `embedded` gains those that it lacks, encoded in batches.

    An `UnreadSample` is one of a `CachingSegmenter`, which decodes it if it must.
    """
    indices = list(indices)
    missing = [n for n in indices if n not in embedded]
    if missing:
        images = [samples[n] if isinstance(samples[n], UnreadSample) else samples[n].image for n in missing]
        embedded |= zip(missing, segmenter.encode(images), strict=True)
    return {n: embedded[n] for n in indices}


def segment(
    segmenter: Segmenter,
    samples: Sequence[Sample | UnreadSample],
    prompts: Sequence[Sequence[Prompts]],
    embedded: Embedded | None = None,
) -> list[list[Candidate]]:
    """One candidate per object, per image, see `merge_boxes`; images without a prompt are not encoded.

    `embedded` has the embeddings made before and gains the others: each image is encoded once, in batches.
    """
    prompted = [n for n, image_prompts in enumerate(prompts) if image_prompts]
    embeddings = embed(segmenter, samples, prompted, {} if embedded is None else embedded)
    single = [[one_box_each(prompt) for prompt in prompts[n]] for n in prompted]
    decoded = segmenter.decode(list(embeddings.values()), [list(chain(*of_image)) for of_image in single])
    out: list[list[Candidate]] = [[] for _ in prompts]
    for n, of_image, candidates in zip(prompted, single, decoded, strict=True):
        rows = iter(candidates)
        out[n] = [merge_boxes(list(islice(rows, len(of_object)))) for of_object in of_image]
    return out


def one_box_each(prompts: Prompts) -> list[Prompts]:
    """A prompt for each box of an object; the first one has the jittered boxes."""
    none = np.zeros((0, 4), np.float32)
    further = (replace(prompts, box=box, jittered_boxes=none, scaled_boxes=none) for box in prompts.scaled_boxes)
    return [replace(prompts, scaled_boxes=none), *further]


def merge_boxes(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of an object from those of its boxes: the one whose mask agrees best with all other masks.

    That is the one with the highest mean Dice, jittered masks included; of equals the one with the higher predicted
    IoU, then the first. The best masks of the other boxes precede the jittered masks, so that they take part in
    `Evidence.jitter_dice` and in the vote of `kmine.mining.refine`. (Own choice: agreement needs no score, which some
    segmenters lack and others have untrained. Without the jittered masks, all of the first box, the middle one of three
    nested boxes would always be chosen.)
    """
    if len(candidates) == 1:
        return candidates[0]
    best = [candidate.masks[candidate.best] for candidate in candidates]
    jittered = [mask for candidate in candidates for mask in candidate.jittered_masks]
    scores = [float(np.nan_to_num(candidate.predicted_iou[candidate.best])) for candidate in candidates]

    place = masks.window(*best, *jittered)

    def rank(n: int) -> tuple[float, float, int]:
        others = [mask[place] for mask in (*best[:n], *best[n + 1 :], *jittered)]
        return sum(metrics.dice(best[n][place], mask) for mask in others) if best[n].any() else 0.0, scores[n], -n

    chosen = max(range(len(best)), key=rank)
    others = np.stack([*best[:chosen], *best[chosen + 1 :], *jittered])
    return replace(candidates[chosen], jittered_masks=others)


def segment_twice(
    segmenter: Segmenter,
    samples: Sequence[Sample | UnreadSample],
    prompts: Sequence[Sequence[Prompts]],
    reprompt: Callable[[int, int, Prompts, Candidate], Prompts],
    embedded: Embedded | None = None,
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """Two passes on the same embeddings; returns the prompts of the second pass and its candidates.

    Where the second candidate is empty, prompt and candidate of the first pass stay. `reprompt` makes the prompt of the
    second pass from (image index, object index, prompt, candidate) of the first.
    """
    embedded = {} if embedded is None else embedded
    first = segment(segmenter, samples, prompts, embedded)
    reprompted = [
        [reprompt(n, k, *pair) for k, pair in enumerate(zip(*image, strict=True))]
        for n, image in enumerate(zip(prompts, first, strict=True))
    ]
    second = segment(segmenter, samples, reprompted, embedded)
    for n, candidates in enumerate(second):
        for k, candidate in enumerate(candidates):
            if not candidate.masks[candidate.best].any():
                candidates[k], reprompted[n][k] = first[n][k], prompts[n][k]
    return reprompted, second
