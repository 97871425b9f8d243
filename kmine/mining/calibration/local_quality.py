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
from kmine.mining.gate import gather
from kmine.mining.prompts import find_prompts
from kmine.ops.calibrator import Calibrator, feature_rows
from kmine.segmenters.base import Embedding
from kmine.segmenters.identity import Echo
from kmine.types import Evidence, Probs, Prompts

SETTINGS = ("box", "points", "min_area_px", "min_area_fraction", "box_margin")
"""Of the prompts: all that the evidence depends on when nobody is asked."""


class Found(NamedTuple):
    """An object that the local model sees."""

    prompts: Prompts
    """With its component and class."""
    evidence: Evidence


@dataclass(frozen=True)
class Alone:
    """What was learnt of the local model's own masks, with all that it takes to judge others."""

    calibrators: Mapping[str, Calibrator]
    """By test-time augmentation (`infer.tta`): flips change the evidence, so each has one of its own."""
    labeled_area: Mapping[int, float]
    """Per class, the median share of the image that one labeled object covers."""
    prompts: PromptsConfig
    """See `unasked`."""

    def estimates(self, probs: Probs, tta: str) -> list[tuple[Prompts, float]]:
        """Each object that is seen, with its estimated Dice; by class, largest first.

        Args:
            probs: of one image (or slice), predicted with `tta`.
            tta: a key of `calibrators`.
        """
        found = objects_of(probs, self.prompts, self.labeled_area)
        values = self.calibrators[tta].estimates(feature_rows([one.evidence for one in found])) if found else []
        return [(one.prompts, float(value)) for one, value in zip(found, values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "labeled_area": {str(class_id): area for class_id, area in self.labeled_area.items()},
            "prompts": {name: value for name, value in asdict(self.prompts).items() if name in SETTINGS},
            "by_tta": {tta: {"calibrator": one.to_json()} for tta, one in self.calibrators.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Alone:
        """From `to_json`, or from what calibration.json has under `alone`, which says more of each calibrator."""
        return cls(
            {tta: Calibrator.from_json(one["calibrator"]) for tta, one in value["by_tta"].items()},
            {int(class_id): float(area) for class_id, area in value["labeled_area"].items()},
            unasked(PromptsConfig(**{name: value["prompts"][name] for name in SETTINGS})),
        )


def unasked(cfg: PromptsConfig) -> PromptsConfig:
    """The prompts without what only a segmenter reads: hints, shaken boxes, a second pass."""
    return replace(cfg, source="local", passes=1, points=not cfg.box, mask_hint=False, num_jitters=0)


def objects_of(probs: Probs, cfg: PromptsConfig, labeled_area: Mapping[int, float]) -> list[Found]:
    """The objects that mining would ask about, each with the evidence of its own component.

    Scores of a segmenter are NaN. So is `witness_dice`: predicting has one local model.
    """
    asked = find_prompts(probs, cfg, seed=0, round_idx=0)
    (answers,) = Echo().decode([Embedding(size=probs.probs.shape[1:])], [asked])
    pairs = zip(asked, answers, strict=True)
    return [Found(one, gather(probs, one, answer, labeled_area)) for one, answer in pairs]


def sentence(alone: Mapping[str, Any]) -> str:
    """What the estimates rest on; `alone` is what calibration.json has under that name."""
    learnt = [
        f"with tta {tta}: {one['num_objects']} objects of labeled images, rank correlation with true Dice "
        f"{_number(one['rank_correlation'])}, mean estimate {_number(one['mean']['estimate'])} where mean Dice was "
        f"{_number(one['mean']['dice'])}"
        for tta, one in alone["by_tta"].items()
    ]
    return (
        f"estimated_dice was learnt on {alone['num_parts']} models that had not seen these objects and knew fewer "
        "labels than the final one, whose masks it may order less well than theirs; by estimates made without the "
        f"object, {'; '.join(learnt)}"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None or value != value else f"{value:.2f}"
