"""Identity segmenter: returns the local model's own mask. Mining with it is the method `self_training`.

Everything else is as in mining, so a comparison isolates the segmenter's effect. It is no choice of `segmenter.name`.
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
    signature = hashlib.sha256(b"echo: the component of the prompts").hexdigest()
    """sha256 of the rule: it has no weights."""

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """See `Segmenter.encode`; embeddings have no features."""
        return [Embedding(size=(image.shape[0], image.shape[1])) for image in images]

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """See `Segmenter.decode`; M = 1, no jittered masks: all would be equal. `ValueError` without a component."""
        return [[_identity_candidate(prompt) for prompt in of_image] for of_image in prompts]


def _identity_candidate(prompts: Prompts) -> Candidate:
    if prompts.component is None:
        raise ValueError("expected prompts with the local model's component, got none; set prompts.source local")
    unknown = np.full(1, np.nan, np.float32)
    masks = prompts.component[None]
    return Candidate(masks, unknown, unknown.copy(), None, jittered_masks=masks[:0])
