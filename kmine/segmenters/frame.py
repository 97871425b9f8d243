"""The square frame in which a network sees an image; coordinates, mask inputs and masks change frame only here.

E is the side of the network's input, S that of its mask inputs and logits; H, W the image's own frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kmine.segmenters.base import MASK_INPUT_CLIP

EPS = 1e-6


@dataclass(frozen=True)
class SquareFrame:
    """How images of (H, W) lie in the square input."""

    side: int
    """E."""
    squash: bool = False
    """True: each axis is stretched to E. False: the longest side becomes E, and below and on the right is padding."""
    as_probabilities: bool = False
    """Whether probabilities, not logits, are resized to the image, as MedSAM's authors do."""

    def covered(self, size: tuple[int, int], side: int | None = None) -> tuple[int, int]:
        """(rows, columns) of a square of `side` (default E) that an image of `size` = (H, W) covers."""
        side = side or self.side
        if self.squash:
            return side, side
        scale = side * 1.0 / max(size)
        # The short side of an extremely long image would round to 0.
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def points(self, coords: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float64]:
        """(..., 2) points (x, y) of an image of `size` in the network's frame."""
        rows, columns = self.covered(size)
        return np.asarray(coords, np.float64) * (columns / size[1], rows / size[0])

    def boxes(self, boxes: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float64]:
        """(B, 4) boxes XYXY of an image of `size` in the network's frame."""
        return self.points(np.reshape(boxes, (-1, 2, 2)), size).reshape(-1, 4)

    def mask_input(self, logits: NDArray[np.float32], side: int) -> Tensor:
        """(H, W) logits to (1, S, S) with S = `side`: clipped, resized, padded with -`MASK_INPUT_CLIP`.

        The padding holds no object, so it is set to certain background, the output of a network trained on masks that
        are zero there. Zeros would mean p = 1/2 and make an edge at the image's border.
        """
        height, width = self.covered(logits.shape, side)
        plane = torch.from_numpy(np.clip(logits, -MASK_INPUT_CLIP, MASK_INPUT_CLIP, dtype=np.float32))[None, None]
        resized = F.interpolate(plane, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return F.pad(resized, (0, side - width, 0, side - height), value=-MASK_INPUT_CLIP)[0]

    def upscaled(self, low_res: Tensor, size: Sequence[int]) -> Tensor:
        """(B, M, S, S) logits to (B, M, H, W) in the frame of an image of `size`, as `Sam.postprocess_masks`."""
        out = low_res.sigmoid() if self.as_probabilities else low_res
        if not self.squash:
            rows, columns = self.covered((size[0], size[1]))
            out = F.interpolate(out, (self.side, self.side), mode="bilinear", align_corners=False)
            out = out[..., :rows, :columns]
        out = F.interpolate(out, tuple(size), mode="bilinear", align_corners=False)
        return out.logit(EPS) if self.as_probabilities else out
