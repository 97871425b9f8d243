"""No segmenter at all: the local model's own masks come back, so that mining with it is self-training.

What mining has beyond self-training is the segmenter alone: rounds, evidence, gate, refinement and training are the
same. It is no choice of `segmenter.name`; comparisons put it in the segmenter's place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.segmenters.base import Embedding
from kmine.types import Candidate, Prompts


class IdentitySegmenter:
    """A `Segmenter` that answers with the local model's own component, whatever the boxes; it has no scores.

    What the evidence is worth depends on whose masks they are: a calibrated gate has to be calibrated with it, too.
    """

    name = "none"

    @property
    def signature(self) -> str:
        """sha256 of the rule: it has no weights."""
        return hashlib.sha256(b"echo: the component of the prompts").hexdigest()

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Sizes of (H, W, 3) uint8 RGB images alone."""
        return [Embedding(size=(image.shape[0], image.shape[1])) for image in images]

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """One candidate per prompt, M = 1, without jittered masks: shaking a box would change nothing.

        Raises:
            ValueError: prompts without the component that they came from.
        """
        return [[_identity_candidate(prompt) for prompt in of_image] for of_image in prompts]


def _identity_candidate(prompts: Prompts) -> Candidate:
    if prompts.component is None:
        raise ValueError("expected prompts with the local model's component, got none; ask with prompts.source local")
    unknown = np.full(1, np.nan, np.float32)
    no_jittered = np.zeros((0, *prompts.component.shape), np.bool_)
    return Candidate(prompts.component[None], unknown, unknown.copy(), None, no_jittered)
