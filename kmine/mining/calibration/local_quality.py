"""Quality estimation for the local model's masks without a segmenter.

`kmine predict` has no segmenter. The evidence available without one is the model's confidence inside and around an
object, its size and the spread over flips; it is collected here for fitting and prediction alike. Imports no torch:
exported models are predicted from without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kmine.config import PromptsConfig
from kmine.mining.gate import collect_evidence
from kmine.mining.prompts import prompts_from_probs
from kmine.ops.calibrator import Calibrator, feature_rows
from kmine.segmenters.base import Embedding
from kmine.segmenters.identity import IdentitySegmenter
from kmine.types import Evidence, Probs, Prompts, none_to_nan

PROMPT_SETTINGS = ("box", "points", "min_area_px", "min_area_fraction", "box_margin")
"""Settings of the prompts that affect the evidence when there is no segmenter."""


@dataclass(frozen=True)
class LocalQualityEstimator:
    """Estimates the Dice of the local model's own masks."""

    calibrators: Mapping[str, Calibrator]
    """By test-time augmentation (`infer.tta`): flips change the evidence, so each has its own."""
    area_prior: Mapping[int, float]
    """Per class, the median share of the image that one labeled object covers."""
    prompts: PromptsConfig
    """See `local_only`."""

    def estimates(self, probs: Probs, tta: str) -> list[tuple[Prompts, float]]:
        """Each object found, with its estimated Dice in [0, 1]; by class, largest first.

        `probs` are of one image or slice, predicted with `tta`, a key of `calibrators`.
        """
        objects = score_local_objects(probs, self.prompts, self.area_prior)
        values = self.calibrators[tta].estimates(feature_rows([evidence for _, evidence in objects]))
        return [(prompts, float(value)) for (prompts, _), value in zip(objects, values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "labeled_area": {str(class_id): area for class_id, area in self.area_prior.items()},
            "prompts": {name: value for name, value in asdict(self.prompts).items() if name in PROMPT_SETTINGS},
            "by_tta": {tta: {"calibrator": calibrator.to_json()} for tta, calibrator in self.calibrators.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LocalQualityEstimator:
        """From `to_json`, or from `alone` of calibration.json, which has more fields per calibrator."""
        return cls(
            {tta: Calibrator.from_json(entry["calibrator"]) for tta, entry in value["by_tta"].items()},
            {int(class_id): float(area) for class_id, area in value["labeled_area"].items()},
            local_only(PromptsConfig(**{name: value["prompts"][name] for name in PROMPT_SETTINGS})),
        )


def local_only(cfg: PromptsConfig) -> PromptsConfig:
    """Prompt settings without those that only a segmenter uses, such as mask inputs and further boxes."""
    return replace(without_segmenter(cfg), points=not cfg.box, mask_hint=False, num_jitters=0, max_objects=None)


def without_segmenter(cfg: PromptsConfig) -> PromptsConfig:
    """Prompt settings for `IdentitySegmenter`: one box each of the local model's own objects, in one pass."""
    return replace(cfg, source="local", passes=1, box_scales=(1.0,), doubtful=None, file=None)


def score_local_objects(
    probs: Probs, cfg: PromptsConfig, area_prior: Mapping[int, float]
) -> list[tuple[Prompts, Evidence]]:
    """The objects that mining would prompt for, each with the evidence of its own component.

    Scores of a segmenter and of an auxiliary model are NaN.
    """
    prompts = prompts_from_probs(probs, cfg, seed=0, round_idx=0)
    (candidates,) = IdentitySegmenter().decode([Embedding(size=probs.probs.shape[1:])], [prompts])
    return [(pair[0], collect_evidence(probs, *pair, area_prior)) for pair in zip(prompts, candidates, strict=True)]


def local_quality_summary(record: Mapping[str, Any]) -> str:
    """Basis of the estimates in one sentence; `record` is the content of `alone` in calibration.json."""
    by_tta = [
        f"with tta {tta}: {entry['num_objects']} objects of labeled images, rank correlation with true Dice "
        f"{_format_number(entry['rank_correlation'])}, mean estimate {_format_number(entry['mean']['estimate'])}, "
        f"mean Dice {_format_number(entry['mean']['dice'])}"
        for tta, entry in record["by_tta"].items()
    ]
    return (
        f"estimated_dice was fitted on masks of {record['num_parts']} models trained without these objects, on fewer "
        f"labels than the final model, whose masks it may rank less well; out-of-fold: {'; '.join(by_tta)}"
    )


def _format_number(value: float | None) -> str:
    return "unknown" if np.isnan(none_to_nan(value)) else f"{value:.2f}"
