"""A fitted calibrator of the gate, applied: evidence -> estimated Dice; `stages/calibrate.py` fits it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.types import EVIDENCE_COLUMNS, Evidence

FEATURES = EVIDENCE_COLUMNS


@dataclass(frozen=True)
class Calibrator:
    """Evidence -> estimated Dice: a line through standardised scores, then a rising staircase with straight ramps."""

    fill: tuple[float, ...]
    """Per feature, what stands for a score that could not be had: the median."""
    scale: tuple[float, ...]
    """Per feature, its standard deviation; 0 where it never varied: then it says nothing."""
    weights: tuple[float, ...]
    intercept: float
    knots: tuple[tuple[float, float], ...]
    """(regression value, estimated Dice), rising in both."""

    def estimate(self, evidence: Evidence) -> float:
        """Estimated Dice in [0, 1]."""
        return float(self.estimates(feature_rows([evidence]))[0])

    def estimates(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, F) features -> (N,) in [0, 1]."""
        x, y = np.array(self.knots).T
        return np.interp(linear_predictor(rows, self), x, y)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {"features": list(FEATURES), **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibrator:
        """See `to_json`."""
        lists = {name: tuple(value[name]) for name in ("fill", "scale", "weights")}
        return cls(**lists, intercept=value["intercept"], knots=tuple((x, y) for x, y in value["knots"]))


@dataclass(frozen=True)
class RiskGuarantee:
    """What can be said beforehand about the masks that pass the gate."""

    threshold: float
    """Of estimated Dice: masks below are dropped."""
    kept: bool
    """Whether the target is promised at this threshold; False: nothing at that target can be."""
    lower_bound: float
    """Mean Dice of the accepted that holds with the stated confidence."""
    mean: float
    """Mean Dice of the accepted calibration objects, estimates made without them; NaN where there is none."""
    coverage: float
    """Share of the calibration objects at or above the threshold."""
    num_objects: int
    """Of the calibration, accepted or not."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RiskGuarantee:
        """From plain values, as `dataclasses.asdict` gives them; a mean of nothing is null in JSON."""
        return cls(**{**value, "mean": float("nan") if value["mean"] is None else value["mean"]})


@dataclass(frozen=True)
class Calibration:
    """What the gate goes by: an estimate for the segmenter's mask, one for the local model's, and the threshold."""

    segmenter: Calibrator
    local: Calibrator
    guarantee: RiskGuarantee

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "segmenter": self.segmenter.to_json(),
            "local": self.local.to_json(),
            "promise": asdict(self.guarantee),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """See `to_json`."""
        parts = (Calibrator.from_json(value[name]) for name in ("segmenter", "local"))
        return cls(*parts, RiskGuarantee.from_json(value["promise"]))


def describe_threshold(record: Mapping[str, Any]) -> str:
    """What a round keeps where nothing is promised, in one sentence; `record` is the content of its threshold.json."""
    mean, threshold = record["mean_estimate"], f"estimated Dice {record['threshold']:.2f}"
    sample_size = f"{record['num_objects']} objects in {record['num_images']} unlabeled images"
    if mean is None or math.isnan(mean):
        return f"masks from {threshold} on are kept, none of {sample_size}"
    return f"masks from {threshold} on are kept: {record['coverage']:.0%} of {sample_size}, with a mean estimate of {mean:.2f}"


def feature_rows(evidence: Sequence[Evidence]) -> NDArray[np.float64]:
    """(N, F): the scores as the regression takes them; NaN where there is none."""
    rows = np.array([astuple(e) for e in evidence], float).reshape(len(evidence), len(FEATURES))
    area = FEATURES.index("area_ratio")
    with np.errstate(divide="ignore"):
        # How far from the usual size, in either direction; a thousandth stands for nothing at all.
        rows[:, area] = np.abs(np.log(np.maximum(rows[:, area], 1e-3)))
    return rows


def linear_predictor(rows: NDArray[np.float64], calibrator: Calibrator) -> NDArray[np.float64]:
    """(N, F) features -> (N,) values of the regression, before the staircase."""
    return (
        standardised(rows, np.array(calibrator.fill), np.array(calibrator.scale)) @ np.array(calibrator.weights)
        + calibrator.intercept
    )


def standardised(
    rows: NDArray[np.float64], fill: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N, F) -> (N, F): from the usual value, in deviations; 0 where nothing is known or nothing varies."""
    filled = np.where(np.isfinite(rows), rows, fill)
    return np.where(scale > 1e-9, (filled - fill) / np.maximum(scale, 1e-9), 0.0)
