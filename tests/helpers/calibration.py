"""Settings and rows of a calibration that takes seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from helpers.small import CFG

from kmine.config import AdaptConfig, GateConfig
from kmine.ops.calibrator import FEATURES

SMALL = replace(
    CFG,
    rounds=1,
    gate=GateConfig(mode="calibrated", target_dice=0.3),
    data=replace(CFG.data, num_samples=60, label_fraction=0.6),
    adapt=AdaptConfig(folds=3, fold_steps=30),
    # At 30 steps from random weights these teach more than the defaults, which are made for pretrained ones.
    fit=replace(CFG.fit, steps=30, dice="batch", clip_grad=0.0, flips="both", rotation=30.0, scale=(0.8, 1.25)),
)
FLIPPED = replace(SMALL, infer=replace(SMALL.infer, tta="hflip"))
UNTRAINED = replace(FLIPPED, adapt=AdaptConfig(folds=3, fold_steps=2))
"""For laws that hold whatever the models of the folds have learned."""


def rows(count: int) -> list[dict[str, Any]]:
    """Objects, each in a group of its own, whose segmenter's Dice is their agreement; other scores are missing."""
    agreements = np.random.default_rng(0).uniform(0.5, 1, count)
    missing = dict.fromkeys(FEATURES)
    return [
        missing
        | {"agreement_iou": agreement, "group_id": str(n), "dice_segmenter": agreement, "dice_local": agreement - 0.2}
        for n, agreement in enumerate(agreements)
    ]
