"""Types that pass between the packages of kmine.

Legend for every shape below: H, W height and width of the image in its own (native) frame, K classes with
background 0, P points, M masks of one candidate, S the side of the local model's square input.
Arrays are (row, column); boxes and points are (x, y) in pixels, where pixel (row 0, column 0) is the point
(0, 0). Only `kmine.mining.prompts` converts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Floats = NDArray[np.float64]

SLICE_ID = re.compile(r"(.+)/slice-(\d{4,255})", re.DOTALL)
"""Sample id of a slice: name of the volume, number of the slice; see `slice_id`."""
IGNORE_INDEX = 255
"""Class id of pixels that training and metrics leave out."""

SplitName = Literal["labeled", "unlabeled", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("labeled", "unlabeled", "val", "test")

Severity = Literal["fault", "note"]

REASONS = (
    *("kept", "kept_local", "accepted", "rejected", "lesion_free", "no_component", "vetoed", "empty_candidate"),
    *("low_predicted_iou", "low_stability", "low_agreement", "low_jitter_dice", "low_confidence"),
    *("high_confidence_outside", "high_tta_std", "area_outlier", "contradicts_image_label", "low_estimated_dice"),
    "low_rank",
)
"""Reasons of decisions; those from `low_predicted_iou` to `area_outlier` are of older runs.

`accepted`, `rejected`: by a reviewer, in the audit of an earlier run; the image is not segmented.
`low_rank`: not among the best by evidence, of a gate without calibration.
`kept_local`: of two disagreeing masks the local model's own is used, as its estimated Dice is higher.
`lesion_free`: by the image-level label; the image is not segmented, and its pseudo mask is empty.
`vetoed`: the classifier of sks sees no lesion in the image, so nothing is prompted there; it has no pseudo mask."""

STOPPED_BY = {
    "rounds": "all rounds are done",
    "refused_twice": "two rounds in a row were refused, so the next one would start from the same model again",
    "no_pseudo_masks": "no pseudo mask was kept, so nothing was left to train on",
}
"""Values of `stopped_by` in run.json with their meanings; an unfinished run has `interrupted`."""
ROUND_0, EQUAL_STEPS = "supervised, round 0", "supervised, equal steps"
ONE_SCHEDULE = "supervised, equal steps in one schedule"
"""Names in tables of a run's supervised models: round 0; as many steps as mining, in rounds or in one schedule."""

LESION_FREE = "lesion_free"
"""Reason of an image whose label excludes lesions: it is not segmented, and its pseudo mask is empty."""
ESTIMATED = ("kept", "kept_local", "low_estimated_dice")
"""Reasons of a calibrated gate that depend on the estimated Dice alone; no other check failed."""


def slice_id(volume: str, number: int) -> str:
    """`volume-003/slice-0042`: sample id of a slice, the inverse of `SLICE_ID`."""
    return f"{volume}/slice-{number:04}"


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Entry of a data set's index, made without reading a pixel."""

    sample_id: str
    group_id: str
    """Patient, volume or group of near-duplicates; a split never separates a group."""
    has_mask: bool = True
    """Whether a mask file exists; a sample without one can only be unlabeled."""
    image_label: int | None = None
    """Image-level diagnosis (0: lesion-free), if known."""
    spacing: tuple[float, float] | None = None
    """Millimetres per pixel (row, column), if known."""
    split: str | None = None
    """The data set's own split, if it has one."""


@dataclass(frozen=True)
class Sample:
    """One image, with its mask if its pool was opened with masks."""

    sample_id: str
    group_id: str
    image: NDArray[np.uint8]
    """(H, W, 3) RGB, [0, 255]."""
    mask: NDArray[np.uint8] | None = None
    """(H, W) class ids, or None."""
    image_label: int | None = None
    spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, with its problem."""

    sample_id: str
    path: str
    problem: str


@dataclass(frozen=True)
class Finding:
    """A finding about the data; a `fault` would invalidate results, a `note` does not."""

    code: str
    severity: Severity
    text: str
    samples: tuple[str, ...] = ()
    """The first few affected samples, or pairs of samples ("a = b")."""

    def __str__(self) -> str:
        names = "; ".join(self.samples[:3]) + ("; ..." if len(self.samples) > 3 else "")
        return f"{self.text} [{names}]" if names else self.text


def most_probable(probs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """(..., K, H, W) -> (..., H, W) class ids, of equals the lowest. Much faster than `argmax` over few planes."""
    if probs.shape[-3] == 1:
        return np.zeros((*probs.shape[:-3], *probs.shape[-2:]), np.uint8)
    ids = (probs[..., 1, :, :] > probs[..., 0, :, :]).view(np.uint8)
    for class_id in range(2, probs.shape[-3]):
        best = probs[..., :class_id, :, :].max(axis=-3)
        np.copyto(ids, class_id, where=probs[..., class_id, :, :] > best)
    return ids


@dataclass(frozen=True)
class Probs:
    """The local model's probabilities for one image, in the image's own frame."""

    sample_id: str
    probs: NDArray[np.float32]
    """(K, H, W), sums to 1 over K."""
    tta_std: NDArray[np.float32] | None = None
    """(H, W) standard deviation of the foreground probability over test-time flips; None without them."""

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(H, W) class ids of the most probable class."""
        return most_probable(self.probs)


@dataclass(frozen=True)
class Prompts:
    """Prompts for one object of one image."""

    class_id: int
    box: NDArray[np.float32] | None = None
    """(4,) XYXY pixels, ends inclusive, or None."""
    point_coords: NDArray[np.float32] | None = None
    """(P, 2) as (x, y), or None."""
    point_labels: NDArray[np.int64] | None = None
    """(P,), 1 foreground, 0 background; None exactly when `point_coords` is."""
    mask_input: NDArray[np.float32] | None = None
    """(H, W) logits in the image's own frame, or None; the segmenter converts them to its own frame."""
    jittered_boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(J, 4) XYXY: jittered copies of the box, whose masks measure consistency for the gate."""
    component: Bool | None = None
    """(H, W), the local model's own mask of the object, if the prompts are of one."""
    scaled_boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(B, 4) XYXY: further boxes of the object; `kmine.mining.segment` gives a segmenter one at a time, as `box`."""
    origin: Literal["model", "person"] = "model"
    """Whether a person drew box and points."""


@dataclass(frozen=True)
class Candidate:
    """A segmenter's masks for one `Prompts`."""

    masks: Bool
    """(M, H, W)."""
    predicted_iou: NDArray[np.float32]
    """(M,) in [0, 1]; NaN from a segmenter that predicts none."""
    stability_score: NDArray[np.float32]
    """(M,) in [0, 1]; NaN from a segmenter without logits, and for an empty mask (0/0)."""
    low_res_logits: NDArray[np.float32] | None
    """(M, h, w) in the segmenter's own padded frame, or None."""
    jittered_masks: Bool
    """(J, H, W): the best mask for each jittered box, and for each further box of the object."""

    @property
    def best(self) -> int:
        """Index of the mask with the highest predicted IoU; 0 if all are NaN."""
        return 0 if np.isnan(self.predicted_iou).all() else int(np.nanargmax(self.predicted_iou))


@dataclass(frozen=True)
class Evidence:
    """Scores of a candidate for the gate; NaN where unknown."""

    predicted_iou: float = float("nan")
    stability_score: float = float("nan")
    agreement_iou: float = float("nan")
    """IoU of the candidate with the local model's own component."""
    jitter_dice: float = float("nan")
    """Mean pairwise Dice of the masks for all boxes and for jittered copies."""
    confidence_inside: float = float("nan")
    """Mean local probability of the class inside the candidate."""
    confidence_outside: float = float("nan")
    """Mean local probability of the class inside the box but outside the candidate."""
    area_ratio: float = float("nan")
    """Candidate area / image area, over the median of the same in the labeled masks."""
    tta_std: float = float("nan")
    """Mean standard deviation of the foreground probability over test-time flips, inside the candidate."""
    auxiliary_dice: float = float("nan")
    """Dice of the candidate with the objects that the auxiliary model finds there; NaN without such a model."""
    slice_dice: float = float("nan")
    """The same with those of the local model on the slice before or after, the better one; NaN without such slices."""


EVIDENCE_COLUMNS = tuple("witness_dice" if f.name == "auxiliary_dice" else f.name for f in fields(Evidence))
"""Names of the scores on disk (Parquet columns, JSON keys), in the order of the fields."""


@dataclass(frozen=True)
class Decision:
    """The gate's decision on one object of one image."""

    kept: bool
    reason: str
    evidence: Evidence
    estimated_dice: float = float("nan")
    """Calibrated estimate of the Dice of the mask that is used; NaN without a calibration."""
    estimated_segmenter: float = float("nan")
    """Estimate for the segmenter's mask; of the mask that is not used by the estimated difference."""
    estimated_local: float = float("nan")
    """Likewise for the local model's own component; NaN if there is none."""
    source: Literal["both", "segmenter", "local"] = "both"
    """Which mask is used where the two disagree; `both`: neither, these pixels are ignored."""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason must be one of {REASONS}, got {self.reason!r}")
        if self.kept != (self.reason in ("kept", "kept_local")):
            raise ValueError(f"kept={self.kept} contradicts reason={self.reason!r}")


@dataclass(frozen=True)
class PseudoLabel:
    """A pseudo mask of an unlabeled image, from `kmine.mining.refine` to training."""

    mask: NDArray[np.uint8]
    """(H, W) class ids, `IGNORE_INDEX` where the evidence disagrees."""
    reason: str = "kept"
    """`kept` or `kept_local` of the first kept object; `lesion_free` or `accepted` of the image as a whole."""
    weight: float | None = None
    """Mean estimated Dice of the kept objects, [0, 1], for `fit.pseudo_weight estimated`; None without an estimate."""
    signature: str = ""
    """What the mask was made from: model, segmenter, settings."""
    round_idx: int = 0
    """The round that made it."""

    @property
    def lesion_free(self) -> bool:
        """Whether the mask is empty because of an image-level label."""
        return self.reason == LESION_FREE


@dataclass(frozen=True)
class CaseMetrics:
    """Metrics of one case, averaged over the foreground classes in truth or prediction."""

    sample_id: str
    dice: float
    """NaN where truth and prediction are both empty."""
    iou: float
    hd95: float
    """95th percentile Hausdorff distance; a miss: the diagonal. In mm where all spacings are known, else in pixels."""
    num_missed: int
    """Foreground classes of the truth with an empty prediction."""
    counts: tuple[tuple[int, int, int], ...] = ()
    """Pixels of each foreground class in both, prediction and truth, added over slices; empty in older metrics."""

    def __post_init__(self) -> None:
        # JSON has lists only; a case that is read equals the one that was written.
        object.__setattr__(self, "counts", tuple(tuple(int(n) for n in row) for row in self.counts))

    @property
    def score(self) -> float:
        """Dice in which silence counts 1 and a false alarm 0: mean over all foreground classes, never NaN.

        Paired differences, adoption and the choice of a checkpoint use it: every case counts under every method.
        """
        if len(self.counts) < 2:
            return 1.0 if math.isnan(self.dice) else self.dice
        dice = [2 * both / (found + truth) if found + truth else 1.0 for both, found, truth in self.counts]
        return sum(dice) / len(dice)


@dataclass(frozen=True)
class Metrics:
    """Per-case metrics and their means over the cases with a value."""

    cases: tuple[CaseMetrics, ...]
    dice: float
    iou: float
    hd95: float
    num_missed: int
    num_empty: int
    """Cases left out because truth and prediction are both empty."""

    @property
    def score(self) -> float:
        """Mean `CaseMetrics.score`; NaN without cases."""
        return sum(case.score for case in self.cases) / len(self.cases) if self.cases else math.nan


def labels_only_dir(name: str) -> str:
    """Folder of the baseline model `name` in a run folder."""
    return f"{name}_labels_only"


def labels_only_method(name: str) -> str:
    """Name of the baseline model `name` in tables."""
    return f"{name} (labels only)"


@dataclass(frozen=True)
class RoundResult:
    """One round of the loop."""

    round_idx: int
    num_labeled: int
    num_pseudo: int
    """Images that entered training with a pseudo mask."""
    metrics: Metrics
    """On the validation split, of the checkpoint chosen on it."""
    final_metrics: Metrics
    """On the validation split, of the last step's checkpoint."""
    adopted: bool
    """False if the score on validation may have fallen: the next round starts from the last adopted one."""
    seconds: dict[str, float]
    """Per stage."""
    reason: str = "adopted"
    """`adopted`, or `refused: ` and why."""
    difference: float = float("nan")
    """Mean over the validation images of `CaseMetrics.score` minus that of the last adopted round, of a retrained model
    minus that of the best round; NaN in round 0."""
    difference_low: float = float("nan")
    """Lower end of its 80 % interval: a one-sided bound of 90 %. Older runs have 90 % and 95 %."""
    difference_high: float = float("nan")
    retrained: bool = False
    """Whether the model was trained once, from the initial weights, in one schedule over the steps of all rounds."""

    @property
    def has_no_pseudo_masks(self) -> bool:
        """Whether this round of mining kept no pseudo mask, so that nothing was trained."""
        return self.round_idx > 0 and self.num_pseudo == 0

    def without_training(self, round_idx: int, seconds: dict[str, float]) -> RoundResult:
        """The result of a later round that found no pseudo mask: metrics of this one, not adopted."""
        refused = {"adopted": False, "seconds": seconds, "reason": "refused: no pseudo mask"}
        return RoundResult(round_idx, self.num_labeled, 0, self.metrics, self.final_metrics, **refused)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RoundResult:
        """From its fields as a dictionary with null for NaN; a `signature` among them is ignored."""

        def metrics(value: Mapping[str, Any]) -> Metrics:
            return Metrics(**value | {"cases": tuple(CaseMetrics(**case) for case in value["cases"])})

        value = none_to_nan({k: v for k, v in saved.items() if k != "signature"})
        return cls(**value | {name: metrics(value[name]) for name in ("metrics", "final_metrics")})


def stopped_by(results: Sequence[RoundResult], rounds: int) -> str:
    """Why mining ended, a key of `STOPPED_BY`, from its results and the configured number of rounds."""
    mined = [result for result in results if not result.retrained]
    if mined[-1].has_no_pseudo_masks:
        return "no_pseudo_masks"
    return "rounds" if mined[-1].round_idx == rounds else "refused_twice"


class ProgressReporter(Protocol):
    """Receives the progress of long work; `kmine.cli.Terminal` draws it."""

    def start(self, title: str, total: int) -> None:
        """Begin a piece of work of `total` steps."""

    def advance(self, done: int, text: str = "") -> None:
        """Report `done` finished steps."""

    def log(self, text: str) -> None:
        """Print a line."""


def none_to_nan(value: Any) -> Any:
    """Copy of a nested value, NaN for None: the inverse of `io.files.nan_to_none` where only numbers are None."""
    if isinstance(value, Mapping):
        return {k: none_to_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [none_to_nan(v) for v in value]
    return math.nan if value is None else value
