"""Identity segmenter: returns the local model's own mask. Mining with it is self-training.

Rounds, evidence, gate, refinement and training are those of mining, so a comparison isolates the segmenter's effect.
It is not a choice of `segmenter.name`; the method `self_training` uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.segmenters.base import Embedding
from kmine.types import Candidate, Prompts


class IdentitySegmenter:
    """A `Segmenter` that returns the local model's component and ignores boxes; it has no scores.

    The value of the evidence depends on the segmenter: a calibrated gate has to be calibrated with this one, too.
    """

    name = "none"

    @property
    def signature(self) -> str:
        """sha256 of the rule: it has no weights."""
        return hashlib.sha256(b"echo: the component of the prompts").hexdigest()

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Sizes only: (H, W, 3) uint8 RGB images to embeddings without features."""
        return [Embedding(size=(image.shape[0], image.shape[1])) for image in images]

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """One candidate per prompt, M = 1, without jittered masks: they would all be equal.

        Raises:
            ValueError: prompts without a component.
        """
        return [[_identity_candidate(prompt) for prompt in of_image] for of_image in prompts]


def _identity_candidate(prompts: Prompts) -> Candidate:
    if prompts.component is None:
        raise ValueError("expected prompts with the local model's component, got none; set prompts.source local")
    unknown = np.full(1, np.nan, np.float32)
    no_jittered = np.zeros((0, *prompts.component.shape), np.bool_)
    return Candidate(prompts.component[None], unknown, unknown.copy(), None, no_jittered)
