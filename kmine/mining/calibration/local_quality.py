"""How good the local model's own masks are when nobody is asked: their evidence, and what it was found to be worth.

`kmine predict` has no segmenter. What its evidence can be without one (how sure the model is inside of an object and
around it, how large the object is, how much flips disagree) is gathered here, for learning and for predicting alike.
Imports no torch: an exported model is judged without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from kmine.config import PromptsConfig
from kmine.mining.gate import collect_evidence
from kmine.mining.prompts import prompts_from_probs
from kmine.ops.calibrator import Calibrator, feature_rows
from kmine.segmenters.base import Embedding
from kmine.segmenters.identity import IdentitySegmenter
from kmine.types import Evidence, Probs, Prompts

PROMPT_SETTINGS = ("box", "points", "min_area_px", "min_area_fraction", "box_margin")
"""Of the prompts: all that the evidence depends on when nobody is asked."""


class ScoredObject(NamedTuple):
    """An object that the local model sees."""

    prompts: Prompts
    """With its component and class."""
    evidence: Evidence


@dataclass(frozen=True)
class LocalQualityEstimator:
    """What was learnt of the local model's own masks, with all that it takes to judge others."""

    calibrators: Mapping[str, Calibrator]
    """By test-time augmentation (`infer.tta`): flips change the evidence, so each has one of its own."""
    area_prior: Mapping[int, float]
    """Per class, the median share of the image that one labeled object covers."""
    prompts: PromptsConfig
    """See `local_only`."""

    def estimates(self, probs: Probs, tta: str) -> list[tuple[Prompts, float]]:
        """Each object that is seen, with its estimated Dice; by class, largest first.

        Args:
            probs: of one image (or slice), predicted with `tta`.
            tta: a key of `calibrators`.
        """
        objects = score_local_objects(probs, self.prompts, self.area_prior)
        values = (
            self.calibrators[tta].estimates(feature_rows([scored.evidence for scored in objects])) if objects else []
        )
        return [(scored.prompts, float(value)) for scored, value in zip(objects, values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "labeled_area": {str(class_id): area for class_id, area in self.area_prior.items()},
            "prompts": {name: value for name, value in asdict(self.prompts).items() if name in PROMPT_SETTINGS},
            "by_tta": {tta: {"calibrator": calibrator.to_json()} for tta, calibrator in self.calibrators.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LocalQualityEstimator:
        """From `to_json`, or from what calibration.json has under `alone`, which says more of each calibrator."""
        return cls(
            {tta: Calibrator.from_json(entry["calibrator"]) for tta, entry in value["by_tta"].items()},
            {int(class_id): float(area) for class_id, area in value["labeled_area"].items()},
            local_only(PromptsConfig(**{name: value["prompts"][name] for name in PROMPT_SETTINGS})),
        )


def local_only(cfg: PromptsConfig) -> PromptsConfig:
    """The prompts without what only a segmenter reads: hints, shaken boxes, a second pass."""
    return replace(cfg, source="local", passes=1, points=not cfg.box, mask_hint=False, num_jitters=0)


def score_local_objects(probs: Probs, cfg: PromptsConfig, area_prior: Mapping[int, float]) -> list[ScoredObject]:
    """The objects that mining would ask about, each with the evidence of its own component.

    Scores of a segmenter are NaN. So is `witness_dice`: predicting has one local model.
    """
    prompts = prompts_from_probs(probs, cfg, seed=0, round_idx=0)
    (candidates,) = IdentitySegmenter().decode([Embedding(size=probs.probs.shape[1:])], [prompts])
    pairs = zip(prompts, candidates, strict=True)
    return [ScoredObject(prompt, collect_evidence(probs, prompt, candidate, area_prior)) for prompt, candidate in pairs]


def local_quality_summary(record: Mapping[str, Any]) -> str:
    """What the estimates rest on; `record` is what calibration.json has under that name."""
    by_tta = [
        f"with tta {tta}: {entry['num_objects']} objects of labeled images, rank correlation with true Dice "
        f"{_format_number(entry['rank_correlation'])}, mean estimate {_format_number(entry['mean']['estimate'])} where mean Dice was "
        f"{_format_number(entry['mean']['dice'])}"
        for tta, entry in record["by_tta"].items()
    ]
    return (
        f"estimated_dice was learnt on {record['num_parts']} models that had not seen these objects and knew fewer "
        "labels than the final one, whose masks it may order less well than theirs; by estimates made without the "
        f"object, {'; '.join(by_tta)}"
    )


def _format_number(value: float | None) -> str:
    return "unknown" if value is None or value != value else f"{value:.2f}"
