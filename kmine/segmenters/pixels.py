"""How MedSAM and LiteMedSAM are fed: other resizing than SAM's, and no mean and deviation."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.segmenters.base import Abilities
from kmine.segmenters.frame import SquareFrame

BOXES_ONLY = Abilities(points=False, mask_input=False, predicted_iou=False)
"""MedSAM was fine-tuned with boxes alone; its head of the predicted IoU had no loss (Ma et al. 2024)."""
LITE_ABILITIES = Abilities(points=False, mask_input=False)
"""LiteMedSAM was trained with boxes alone, and to predict the IoU (train_one_gpu.py of its authors)."""


def medsam_pixels(image: NDArray[np.uint8], frame: SquareFrame) -> NDArray[np.float32]:
    """(3, E, E) in [0, 1] of (H, W, 3): squashed by cubic splines, scaled by its own minimum and maximum.

    As `MedSAM_Inference.py` of bowang-lab/MedSAM, which uses `skimage.transform.resize`: order 3, anti-aliasing, then
    cut to uint8.
    """
    is_grey = bool((image == image[..., :1]).all())
    planes = [_spline_resized(image[..., n], frame.side) for n in range(1 if is_grey else 3)]
    return min_max(np.stack(planes * 3 if is_grey else planes))


def lite_medsam_pixels(image: NDArray[np.uint8], frame: SquareFrame) -> NDArray[np.float32]:
    """(3, E, E) in [0, 1] of (H, W, 3): longest side E by area averages, own minimum and maximum, padded with zeros.

    As `CVPR24_LiteMedSAM_infer.py` of bowang-lab/MedSAM.
    """
    rows, columns = frame.covered((image.shape[0], image.shape[1]))
    resized = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    padding = ((0, 0), (0, frame.side - rows), (0, frame.side - columns))
    return np.pad(min_max(resized.transpose(2, 0, 1)), padding)


def min_max(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Values as shares of the range between their minimum and maximum; 0 where all are equal."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-8)).astype(np.float32)


def _spline_resized(plane: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(side, side) of (H, W), by the definition of skimage.transform.resize with order 3 and anti-aliasing."""
    from scipy import ndimage

    factors = np.divide(plane.shape, side)
    blurred = ndimage.gaussian_filter(plane.astype(np.float64), np.maximum(0, (factors - 1) / 2), mode="mirror")
    out = ndimage.zoom(blurred, 1 / factors, order=3, mode="mirror", grid_mode=True)
    return np.clip(out, plane.min(), plane.max()).astype(np.uint8)
