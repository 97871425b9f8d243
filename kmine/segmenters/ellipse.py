"""The ellipse inscribed in the box, without use of the image: a lower bound for every segmenter.

On real polyps its IoU is well above that of the filled box: it separates use of the image from rounded corners.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.segmenters.base import Embedding, box_required_error, check_images, check_pairs, check_prompts
from kmine.types import Candidate, Prompts


class Ellipse:
    """A `Segmenter` that returns the ellipse inscribed in each box; points and mask inputs are ignored.

    `predicted_iou` and `stability_score` are NaN, and there are no logits.
    """

    name = "ellipse"

    signature = hashlib.sha256(b"ellipse: inscribed in the box, pixel centres, border included").hexdigest()
    """sha256 of the rule; there are no weights."""

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """See `Segmenter.encode`; embeddings have no features."""
        check_images(images)
        return [Embedding(size=(image.shape[0], image.shape[1])) for image in images]

    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """See `Segmenter.decode`; one ellipse per box, M = 1."""
        check_pairs(embeddings, prompts)
        return [
            [_candidate(prompt, embedding.size) for prompt in of_image]
            for embedding, of_image in zip(embeddings, prompts, strict=True)
        ]


def _candidate(prompts: Prompts, size: tuple[int, int]) -> Candidate:
    checked = check_prompts(prompts, size)
    if checked.box is None:
        raise box_required_error(Ellipse.name)
    masks = np.stack([ellipse_mask(box, size) for box in (checked.box, *checked.jittered_boxes)])
    unknown = np.full(1, np.nan, np.float32)
    return Candidate(masks[:1], unknown, unknown.copy(), None, jittered_masks=masks[1:])


def ellipse_mask(box: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) ellipse inscribed in a box, (4,) XYXY in pixels with area; a centre on the border counts as inside."""
    # float64: in float32 rounding could put a border pixel of a large image on either side.
    x0, y0, x1, y1 = np.asarray(box, np.float64)
    rows = (np.arange(size[0]) - (y0 + y1) / 2) / ((y1 - y0) / 2)
    columns = (np.arange(size[1]) - (x0 + x1) / 2) / ((x1 - x0) / 2)
    return rows[:, None] ** 2 + columns[None, :] ** 2 <= 1
