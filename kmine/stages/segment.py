"""Prompts to candidates: ask the promptable model."""

from __future__ import annotations

from collections.abc import Sequence

from kmine.records import Candidate, Prompts, Sample
from kmine.segmenters.base import Segmenter


def segment(
    segmenter: Segmenter, samples: Sequence[Sample], prompts: Sequence[Sequence[Prompts]]
) -> list[list[Candidate]]:
    """One candidate per prompt, per image; images without a prompt are not encoded.

    Args:
        segmenter: encodes the images in batches, once each.
        samples: the images.
        prompts: per image, one entry per object.
    """
    asked = [n for n, found in enumerate(prompts) if found]
    embeddings = segmenter.encode([samples[n].image for n in asked])
    answers = segmenter.decode(embeddings, [prompts[n] for n in asked])
    out: list[list[Candidate]] = [[] for _ in samples]
    for n, candidates in zip(asked, answers, strict=True):
        out[n] = candidates
    return out
