"""Prompts to candidates: ask the promptable model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kmine.segmenters.base import Embedding, Segmenter
from kmine.types import Candidate, Prompts, Sample

Embedded = dict[int, Embedding]
"""Embeddings by the number of the image, of those that something is asked about."""


def embed(segmenter: Segmenter, samples: Sequence[Sample], indices: Iterable[int]) -> Embedded:
    """Embeddings of the images with these numbers, made in batches."""
    indices = list(indices)
    return dict(zip(indices, segmenter.encode([samples[n].image for n in indices]), strict=True))


def segment(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    cached: Mapping[int, Embedding] | None = None,
) -> list[list[Candidate]]:
    """One candidate per prompt, per image; images without a prompt are not encoded.

    Args:
        segmenter: encodes the images in batches, once each.
        samples: the images.
        prompts: per image, one entry per object.
        cached: embeddings that were made before; these images are not encoded again.
    """
    return _decode(segmenter, _embed_missing(segmenter, samples, prompts, cached), prompts)


def segment_twice(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    reprompt: Callable[[int, int, Prompts, Candidate], Prompts],
    cached: Mapping[int, Embedding] | None = None,
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """The same in two passes on embeddings made once; the prompts of the second pass and its answers.

    Where the second answer is empty, prompt and answer of the first one stay.

    Args:
        segmenter, samples, prompts, cached: as in `segment`.
        reprompt: (image, object, what was asked, what was answered) -> what to ask next; numbers from 0.
    """
    embedded = _embed_missing(segmenter, samples, prompts, cached)
    first = _decode(segmenter, embedded, prompts)
    second_prompts = [
        [
            reprompt(n, k, prompt, candidate)
            for k, (prompt, candidate) in enumerate(zip(image_prompts, candidates, strict=True))
        ]
        for n, (image_prompts, candidates) in enumerate(zip(prompts, first, strict=True))
    ]
    second = _decode(segmenter, embedded, second_prompts)
    for before, candidates, second_image_prompts, image_prompts in zip(
        first, second, second_prompts, prompts, strict=True
    ):
        for k, candidate in enumerate(candidates):
            if not candidate.masks[candidate.best].any():
                candidates[k], second_image_prompts[k] = before[k], image_prompts[k]
    return second_prompts, second


def _embed_missing(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    cached: Mapping[int, Embedding] | None,
) -> Embedded:
    prompted = [n for n, image_prompts in enumerate(prompts) if image_prompts]
    embeddings = {**(cached or {})}
    embeddings |= embed(segmenter, samples, [n for n in prompted if n not in embeddings])
    return {n: embeddings[n] for n in prompted}


def _decode(segmenter: Segmenter, embedded: Embedded, prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
    decoded = segmenter.decode(list(embedded.values()), [prompts[n] for n in embedded])
    out: list[list[Candidate]] = [[] for _ in prompts]
    for n, candidates in zip(embedded, decoded, strict=True):
        out[n] = candidates
    return out
