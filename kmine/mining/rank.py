"""A gate without calibration: objects ranked by their evidence, the best share of a round is kept.

The scores are standardised over the round's own objects, so no absolute limit is needed: what is a high predicted IoU
differs between segmenters and data sets. Letters: N objects, F features (fields of `Evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from kmine.ops.calibrator import FEATURES, feature_rows, standardised
from kmine.types import Evidence, Floats

PRIOR = Evidence(
    predicted_iou=1.0,
    stability_score=1.0,
    agreement_iou=1.0,
    jitter_dice=1.0,
    confidence_inside=1.0,
    confidence_outside=-1.0,
    area_ratio=-1.0,
    tta_std=-1.0,
    auxiliary_dice=1.0,
    slice_dice=1.0,
)
"""Weight of each standardised score; that of `area_ratio` is of its distance from the usual size.

Own choice: equal weights, signs by the meaning of the scores. experiments/gate/prior.py fits weights to the
calibrations of runs on several data sets."""
TIE = 1e-6
"""Scores this close are equal: the same object in a batch of another size gets other last digits."""
LIMIT = 3.0
"""Standardised scores are clipped to this on both sides, so that none decides alone. Own choice."""
_DIVISOR = 9  # number of scores when the first thresholds were saved, which stay valid
_TO_SD = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


@dataclass(frozen=True)
class Ranking:
    """Medians and spreads of a round's scores, and the combined score from which on objects are kept."""

    centre: tuple[float, ...]
    spread: tuple[float, ...]
    """0 for a score that is constant or unknown; it is ignored."""
    threshold: float

    def scores(self, evidence: Sequence[Evidence]) -> Floats:
        """(N,) combined scores: weighted sums of the standardised scores; a missing one counts as the median."""
        z = standardised(feature_rows(evidence), np.array(self.centre), np.array(self.spread))
        # No matrix product, whose rounding of a row depends on the number of rows.
        return (np.clip(z, -LIMIT, LIMIT) * np.array(astuple(PRIOR))).sum(axis=1) / _DIVISOR

    def keeps(self, evidence: Evidence) -> bool:
        """Whether an object's score reaches the threshold."""
        return bool(self.scores([evidence])[0] >= self.threshold - TIE)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        named = {name: dict(zip(FEATURES, getattr(self, name), strict=True)) for name in ("centre", "spread")}
        return {**named, "threshold": self.threshold}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ranking:
        """See `to_json`; other keys are ignored."""
        centre, spread = (tuple(value[name].get(score, 0.0) for score in FEATURES) for name in ("centre", "spread"))
        return cls(centre, spread, value["threshold"])


def fit_ranking(evidence: Sequence[Evidence], keep: float) -> Ranking:
    """The ranking by which the best share `keep` of the objects is kept, all of equal score together.

    Without objects nothing is known to rank by, and everything is kept.
    """
    columns = [column[np.isfinite(column)] for column in feature_rows(evidence).T]
    centre = tuple(float(np.median(column)) if len(column) else 0.0 for column in columns)
    spread = tuple(_spread(column, middle) for column, middle in zip(columns, centre, strict=True))
    ordered = np.sort(Ranking(centre, spread, 0.0).scores(evidence))[::-1]
    threshold = float(ordered[math.ceil(keep * len(ordered)) - 1]) if len(ordered) else 0.0
    return Ranking(centre, spread, threshold)


def _spread(values: Floats, middle: float) -> float:
    """Robust standard deviation; the usual one where more than half of the values are equal."""
    if not len(values):
        return 0.0
    return float(_TO_SD * np.median(np.abs(values - middle))) or float(values.std())
