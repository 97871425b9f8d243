"""A fitted calibrator of the gate, applied: evidence -> estimated Dice. `kmine.mining.calibration.fit` fits it.

Letters: N objects, F features (fields of `Evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from kmine.types import EVIDENCE_COLUMNS, Evidence, Floats, none_to_nan

FEATURES = EVIDENCE_COLUMNS
LATER = ("slice_dice",)
"""Features that older files lack."""


@dataclass(frozen=True)
class Calibrator:
    """Evidence -> estimated Dice: a linear model of standardised scores, then a non-decreasing piecewise-linear map."""

    fill: tuple[float, ...]
    """Per feature, its median; replaces a missing score."""
    scale: tuple[float, ...]
    """Per feature, its standard deviation; a constant feature has 0 and is ignored."""
    weights: tuple[float, ...]
    intercept: float
    knots: tuple[tuple[float, float], ...]
    """(linear predictor, estimated Dice), non-decreasing in both."""

    def estimate(self, evidence: Evidence) -> float:
        """Estimated Dice in [0, 1]."""
        return float(self.estimates(feature_rows([evidence]))[0])

    def estimates(self, rows: Floats) -> Floats:
        """(N, F) features -> (N,) in [0, 1]."""
        x, y = np.array(self.knots).T
        return np.interp(linear_predictor(rows, self), x, y)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse. A feature of `LATER` without effect is left out."""
        used = [n for n, name in enumerate(FEATURES) if name not in LATER or self.scale[n]]
        lists = {name: [getattr(self, name)[n] for n in used] for name in ("fill", "scale", "weights")}
        return {"features": [FEATURES[n] for n in used], **asdict(self), **lists}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibrator:
        """See `to_json`; features that are not listed have no effect."""
        lists = {}
        for name in ("fill", "scale", "weights"):
            known = dict(zip(value["features"], value[name], strict=True))
            lists[name] = tuple(known.get(feature, 0.0) for feature in FEATURES)
        return cls(**lists, intercept=value["intercept"], knots=tuple((x, y) for x, y in value["knots"]))


@dataclass(frozen=True)
class RiskGuarantee:
    """Bound on the mean Dice of the masks that pass the gate at a threshold."""

    threshold: float
    """Threshold of estimated Dice; masks below are dropped."""
    holds: bool
    """Whether the target is guaranteed at this threshold; False: at no threshold."""
    lower_bound: float
    """Mean Dice of the accepted masks that is guaranteed with the stated confidence."""
    mean: float
    """Mean Dice of the accepted calibration objects, by out-of-fold estimates; NaN without any."""
    coverage: float
    """Share of the calibration objects at or above the threshold."""
    num_objects: int
    """Calibration objects, accepted or not."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse. On disk `holds` is called `kept`."""
        return {"kept" if name == "holds" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RiskGuarantee:
        """See `to_json`; a mean of None, as read from JSON, is NaN."""
        return cls(**{"holds" if name == "kept" else name: entry for name, entry in none_to_nan(value).items()})


class MaskEstimate(NamedTuple):
    """Which of two masks of an object is used, and how good it is estimated to be."""

    source: Literal["both", "segmenter", "local"]
    dice: float
    """Of the mask that is used, in [0, 1]; with `both` of the segmenter's."""
    of_other: float
    """Of the other mask; NaN where there is none."""


@dataclass(frozen=True)
class Calibration:
    """Calibration of the gate: an estimator of quality, one of the difference of two masks, and the threshold."""

    quality: Calibrator
    """Mean Dice of the segmenter's and the local model's mask; its map is that of the mask that is used."""
    difference: Calibrator
    """Dice of the segmenter's mask minus that of the local model's."""
    guarantee: RiskGuarantee

    def estimate(self, evidence: Evidence, margin: float) -> MaskEstimate:
        """The mask that is used with `margin` between the two, and its estimated Dice."""
        rows = feature_rows([evidence])
        (dice,), (difference,), (side,) = used_estimates(rows, self.quality, self.difference, margin)
        of_other = math.nan if side == 0 else min(max(float(dice - side * difference), 0.0), 1.0)
        source = "local" if side < 0 else "both" if side > 0 and difference < margin else "segmenter"
        return MaskEstimate(source, float(dice), of_other)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse. On disk the guarantee is called `promise`."""
        parts = {"quality": self.quality, "difference": self.difference, "promise": self.guarantee}
        return {name: part.to_json() for name, part in parts.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """See `to_json`."""
        parts = (Calibrator.from_json(value[name]) for name in ("quality", "difference"))
        return cls(*parts, RiskGuarantee.from_json(value["promise"]))


def used_sides(rows: Floats, differences: Floats, margin: float) -> Floats:
    """(N,) which mask is used by (N,) estimated differences: -1 the local model's, 1 the segmenter's, 0 the only one.

    The local model has a mask where the agreement of the two is known.
    """
    has_local = np.isfinite(rows[:, FEATURES.index("agreement_iou")])
    return np.where(has_local, np.where(differences <= -margin, -1.0, 1.0), 0.0)


def used_estimates(
    rows: Floats, quality: Calibrator, difference: Calibrator, margin: float
) -> tuple[Floats, Floats, Floats]:
    """(N, F) features -> (N,) estimated Dice of the masks that are used, estimated differences, `used_sides`."""
    differences = linear_predictor(rows, difference)
    sides = used_sides(rows, differences, margin)
    x, y = np.array(quality.knots).T
    return np.interp(linear_predictor(rows, quality) + sides * differences / 2, x, y), differences, sides


def describe_threshold(record: Mapping[str, Any]) -> str:
    """One sentence on what a round keeps without a guarantee; `record` is the content of its threshold.json."""
    sample = f"{record['num_objects']} objects in {record['num_images']} unlabeled images"
    if "keep" in record:
        return f"the best {record['keep']:.0%} by their evidence are kept, measured on {sample}"
    mean, threshold = none_to_nan(record["mean_estimate"]), f"estimated Dice {record['threshold']:.2f}"
    if math.isnan(mean):
        return f"masks from {threshold} on are kept, none of {sample}"
    return f"masks from {threshold} on are kept: {record['coverage']:.0%} of {sample}, mean estimate {mean:.2f}"


def evidence_row(evidence: Evidence) -> dict[str, float]:
    """Scores by feature name; `evidence_from_row` is the inverse."""
    return dict(zip(FEATURES, astuple(evidence), strict=True))


def evidence_from_row(row: Mapping[str, Any]) -> Evidence:
    """See `evidence_row`; other columns are ignored, None is NaN."""
    return Evidence(*(none_to_nan(row.get(name)) for name in FEATURES))


def feature_rows(evidence: Sequence[Evidence]) -> Floats:
    """(N, F) inputs of the regression; NaN for missing scores."""
    rows = np.array([astuple(e) for e in evidence], float).reshape(len(evidence), len(FEATURES))
    area = FEATURES.index("area_ratio")
    with np.errstate(divide="ignore"):
        # Deviation from the usual size in either direction; empty masks count as a thousandth of it.
        rows[:, area] = np.abs(np.log(np.maximum(rows[:, area], 1e-3)))
    return rows


def linear_predictor(rows: Floats, calibrator: Calibrator) -> Floats:
    """(N, F) features -> (N,) values of the regression, before the isotonic map."""
    x = standardised(rows, np.array(calibrator.fill), np.array(calibrator.scale))
    return x @ np.array(calibrator.weights) + calibrator.intercept


def standardised(rows: Floats, fill: Floats, scale: Floats) -> Floats:
    """(N, F) -> (N, F): distance from the median in standard deviations; 0 for missing and constant features."""
    filled = np.where(np.isfinite(rows), rows, fill)
    return np.where(scale > 1e-9, (filled - fill) / np.maximum(scale, 1e-9), 0.0)
