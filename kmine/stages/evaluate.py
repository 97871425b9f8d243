"""Metrics of predictions against given masks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kmine.metrics import case_metrics, summarise
from kmine.records import Metrics, Sample


def evaluate(predictions: Iterable[tuple[Sample, NDArray[np.uint8]]], num_classes: int) -> Metrics:
    """Dice, IoU, HD95 and missed lesions per case, and their means; rules in `kmine.metrics`.

    Args:
        predictions: pairs of a sample with its mask and the predicted (H, W) class ids in the sample's frame.
        num_classes: with background.
    """
    return summarise(case_metrics(s.sample_id, pred, _truth(s), num_classes, s.spacing) for s, pred in predictions)


def _truth(sample: Sample) -> NDArray[np.uint8]:
    if sample.mask is None:
        raise ValueError(f"evaluate: sample {sample.sample_id} was opened without its mask")
    return sample.mask
