"""SAM's official automatic mask generator on precomputed embeddings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from kmine.segmenters.base import Proposals, proposals_of

POINTS_PER_SIDE = 12
"""An image takes this many point prompts squared: about 0.14 s a point on one CPU core at 1024 px, 20 s in all. The
official 32 take seven times as long. Objects between the points are not lost: the local model prompts for them."""
MIN_PREDICTED_IOU = 0.7
MIN_STABILITY = 0.8
"""Own choice. The official .88 and .95 are tuned on natural images; with soft borders they
may leave no proposal."""


class PrecomputedPredictor(SamPredictor):
    """The official predictor with given features instead of an image."""

    def __init__(self, sam: Sam, features: torch.Tensor, size: tuple[int, int]) -> None:
        super().__init__(sam)
        self._precomputed, self._size = features, size

    def set_image(self, image: NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Set the given features; the image is ignored."""
        self.original_size = self._size
        self.input_size = self.transform.get_preprocess_shape(*self._size, self.transform.target_length)
        self.features, self.is_image_set = self._precomputed, True


def propose(sam: Sam, features: torch.Tensor, size: tuple[int, int], *, points_at_once: int) -> Proposals:
    """The official generator's masks of an image of `size` = (H, W), without crops: they would have to be encoded.

    `features` are (1, 256, E/16, E/16) on the device of `sam`; `points_at_once` are decoded in a batch, 3 masks each.
    """
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=POINTS_PER_SIDE,
        points_per_batch=points_at_once,
        pred_iou_thresh=MIN_PREDICTED_IOU,
        stability_score_thresh=MIN_STABILITY,
        crop_n_layers=0,
    )
    generator.predictor = PrecomputedPredictor(sam, features, size)
    records = generator.generate(np.broadcast_to(np.uint8(0), (*size, 3)))  # only its size is used
    names = ("segmentation", "predicted_iou", "stability_score")
    return proposals_of(size, *([record[name] for record in records if record["area"]] for name in names))
