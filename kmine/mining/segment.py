"""Prompts to candidates: run the promptable segmenter on a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kmine.segmenters.base import Embedding, Segmenter
from kmine.types import Candidate, Prompts, Sample

Embedded = dict[int, Embedding]
"""Embeddings by index of the image, for the images encoded so far."""


def embed(segmenter: Segmenter, samples: Sequence[Sample], indices: Iterable[int], embedded: Embedded) -> Embedded:
    """Embeddings of the images `indices`, in that order; `embedded` gains those that it lacks, encoded in batches."""
    indices = list(indices)
    missing = [n for n in indices if n not in embedded]
    if missing:
        embedded |= zip(missing, segmenter.encode([samples[n].image for n in missing]), strict=True)
    return {n: embedded[n] for n in indices}


def segment(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    embedded: Embedded | None = None,
) -> list[list[Candidate]]:
    """One candidate per prompt, per image; images without a prompt are not encoded.

    `embedded` has the embeddings made before and gains the others: each image is encoded once, in batches.
    """
    prompted = [n for n, image_prompts in enumerate(prompts) if image_prompts]
    embeddings = embed(segmenter, samples, prompted, {} if embedded is None else embedded)
    decoded = segmenter.decode(list(embeddings.values()), [prompts[n] for n in prompted])
    out: list[list[Candidate]] = [[] for _ in prompts]
    for n, candidates in zip(prompted, decoded, strict=True):
        out[n] = candidates
    return out


def segment_twice(
    segmenter: Segmenter,
    samples: Sequence[Sample],
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
