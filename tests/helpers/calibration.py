"""Settings and rows of a calibration that takes seconds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers.small import CFG

from kmine.config import AdaptConfig, GateConfig
from kmine.mining.calibration.step import FEATURES

SMALL = replace(
    CFG,
    rounds=1,
    gate=GateConfig(mode="calibrated", target_dice=0.3),
    data=replace(CFG.data, num_samples=60, label_fraction=0.6),
    adapt=AdaptConfig(folds=3, fold_steps=30),
    fit=replace(CFG.fit, steps=30),
)


def rows(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        agreement = rng.uniform(0.5, 1)
        row = dict.fromkeys(FEATURES, None) | {"agreement_iou": agreement, "group_id": str(n)}
        found.append(row | {"dice_segmenter": agreement, "dice_local": agreement - 0.2})
    return found
