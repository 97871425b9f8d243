"""Prompts to candidates: ask the promptable model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kmine.segmenters.base import Embedding, Segmenter
from kmine.types import Candidate, Prompts, Sample

Embedded = dict[int, Embedding]
"""Embeddings by the number of the image, of those that something is asked about."""


def embed(segmenter: Segmenter, samples: Sequence[Sample], wanted: Iterable[int]) -> Embedded:
    """Embeddings of the images with these numbers, made in batches."""
    wanted = list(wanted)
    return dict(zip(wanted, segmenter.encode([samples[n].image for n in wanted]), strict=True))


def segment(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    known: Mapping[int, Embedding] | None = None,
) -> list[list[Candidate]]:
    """One candidate per prompt, per image; images without a prompt are not encoded.

    Args:
        segmenter: encodes the images in batches, once each.
        samples: the images.
        prompts: per image, one entry per object.
        known: embeddings that were made before; these images are not encoded again.
    """
    return _answers(segmenter, _embedded(segmenter, samples, prompts, known), prompts)


def segment_twice(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    again: Callable[[int, int, Prompts, Candidate], Prompts],
    known: Mapping[int, Embedding] | None = None,
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """The same in two passes on embeddings made once; the prompts of the second pass and its answers.

    Where the second answer is empty, prompt and answer of the first one stay.

    Args:
        segmenter, samples, prompts, known: as in `segment`.
        again: (image, object, what was asked, what was answered) -> what to ask next; numbers from 0.
    """
    embedded = _embedded(segmenter, samples, prompts, known)
    first = _answers(segmenter, embedded, prompts)
    second_prompts = [
        [again(n, k, asked, answer) for k, (asked, answer) in enumerate(zip(some, answers, strict=True))]
        for n, (some, answers) in enumerate(zip(prompts, first, strict=True))
    ]
    second = _answers(segmenter, embedded, second_prompts)
    for before, answers, some, asked in zip(first, second, second_prompts, prompts, strict=True):
        for k, answer in enumerate(answers):
            if not answer.masks[answer.best].any():
                answers[k], some[k] = before[k], asked[k]
    return second_prompts, second


def _embedded(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    known: Mapping[int, Embedding] | None,
) -> Embedded:
    asked = [n for n, found in enumerate(prompts) if found]
    made = {**(known or {})}
    made |= embed(segmenter, samples, [n for n in asked if n not in made])
    return {n: made[n] for n in asked}


def _answers(segmenter: Segmenter, embedded: Embedded, prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
    answers = segmenter.decode(list(embedded.values()), [prompts[n] for n in embedded])
    out: list[list[Candidate]] = [[] for _ in prompts]
    for n, candidates in zip(embedded, answers, strict=True):
        out[n] = candidates
    return out
