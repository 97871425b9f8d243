"""Input of the report of a run, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.ops.statistics import Paired
from kmine.types import Prompts, Skipped

Category = Literal["best", "worst", "dropped"]
"""Of the gallery; best and worst by the gate's scores, without ground truth."""


@dataclass(frozen=True)
class RoundRow:
    """Numbers of one round, for tables and charts. Unknown floats are NaN."""

    round_idx: int
    num_labeled: int
    num_pseudo: int
    dice: float
    """Mean per-case Dice on validation of the checkpoint chosen there; likewise `iou`, `hd95` and `num_missed`."""
    iou: float
    hd95: float
    num_missed: int
    dice_final: float
    """Mean per-case Dice on validation of the checkpoint of the last step."""
    adopted: bool
    supervised_dice: float | None = None
    """Supervised baseline at equal optimizer steps, checkpoint in use; None without a baseline."""
    supervised_dice_final: float | None = None
    coverage: float = float("nan")
    """Share of the unlabeled images that have a pseudo mask."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Objects by the gate's reason; empty in round 0."""
    changed_pixels: float | None = None
    """Share of the kept objects' pixels where the local and the used mask differ; 0 is self-training."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per stage."""
    supervised_adopted: bool | None = None
    """Whether the baseline adopted this round by the same rule; None if unknown."""
    reason: str = "adopted"
    """`adopted`, or `refused: ` with the cause; for mining, not for the baseline."""
    difference: float = float("nan")
    """Mean difference in Dice to the last adopted round, over the validation images (silence on a clean image counts 1
    and a false alarm 0); its 80 % interval (in older runs 90 %) follows."""
    difference_low: float = float("nan")
    difference_high: float = float("nan")
    num_new: int | None = None
    """Images pseudo-labeled for the first time; None in round 0, likewise the next two."""
    num_readmitted: int | None = None
    """Images pseudo-labeled again, but not in the previous round."""
    num_removed: int | None = None
    """Images pseudo-labeled in the previous round and no more."""
    changed_label_pixels: float | None = None
    """Share of the kept objects' pixels with a training label that differs from the local model's mask."""
    ignored_pixels: float | None = None
    """Share of all pixels of the pseudo masks that is ignored."""
    num_empty: int = 0
    """Validation cases without Dice: truth and prediction empty."""
    num_clean: int = 0
    """Clean validation cases; of several classes, the sum over them."""
    dice_lesion: float = float("nan")
    """Mean Dice where there is a lesion: the same cases in every row, unlike `dice`."""
    false_alarm_rate: float = float("nan")
    """Share of the clean cases with a prediction."""
    supervised_dice_lesion: float | None = None
    supervised_false_alarm_rate: float | None = None
    retrained: bool = False
    """Whether the model was trained once, in one schedule over the steps of all rounds."""
    kept: bool = False
    """Whether its model is the one that the run keeps."""
    correction: str = "–"
    """Shares of the local model's wrong pixels corrected / newly broken, known after `kmine audit --with_withheld`."""
    by_model: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Figures `BY_MODEL` of each baseline model, trained on the labels only for as many steps."""


BY_MODEL = ("dice", "dice_lesion", "false_alarm_rate")
"""Figures of a baseline model, fields of `RoundRow`."""

CSV_COLUMNS = {"num_removed": "num_expelled", "changed_label_pixels": "taught_pixels"}
"""Columns of results.csv that are not named as the field."""


@dataclass(frozen=True)
class GalleryItem:
    """One mined image with all steps. H, W: the image's own frame."""

    category: Category
    sample_id: str
    round_idx: int
    reason: str
    """The gate's reason; with several objects, the decisive one."""
    scores: dict[str, float]
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    prompts: list[Prompts]
    local_mask: NDArray[np.uint8]
    """(H, W) class ids of the local model."""
    segmenter_mask: NDArray[np.uint8]
    """(H, W) class ids of the union of the segmenter's masks."""
    pseudo_mask: NDArray[np.uint8] | None = None
    """(H, W) class ids, 255 ignored; None if nothing was kept."""


@dataclass(frozen=True)
class Calibrated:
    """Quality of the gate's estimates on labeled objects held out from training."""

    risk_coverage: list[tuple[float, float]]
    """(share accepted, their mean Dice), in the order of trust."""
    reliability: list[tuple[float, float, int]]
    """(mean estimate, mean Dice, count) of bins."""
    coverage: float
    """Share of objects that the gate accepts."""
    target: float
    """Target of the mean Dice."""


@dataclass(frozen=True)
class Report:
    """Content of the page."""

    title: str
    dataset: str
    model: str
    segmenter: str
    command: str
    rounds: list[RoundRow]
    gallery: list[GalleryItem] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    """Git commit, versions, seed, device, fingerprints, `stopped_by` and more."""
    config_yaml: str = ""
    objects: str = ""
    """Names of the classes, without the background."""
    warnings: Sequence[tuple[str, str]] = ()
    """What limits the figures, and its cure (empty without one), the weightiest first; without a stop."""
    advice: str = ""
    """The one thing to do next, as `kmine.loop.advice.next_step` has it."""
    commands: Sequence[tuple[str, str]] = ()
    """What to type next, and what for."""
    notes: Sequence[str] = ()
    """What happened, in sentences."""
    skipped: list[Skipped] = field(default_factory=list)
    validation_cases: int = 0
    calibration: Calibrated | None = None
    """None if the gate is not calibrated."""
    gain: Paired | None = None
    """Difference in Dice of mining to the baseline, each by its kept round, with a 95 % interval over groups;
    None without a baseline or where the validation images are too few."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Dice on validation of the kept rounds of supervised and supervised_once, that of *the* baseline first."""
    history: Sequence[tuple[str, int, int, float, float]] = ()
    """(arm, round, step, loss, score) of history.csv."""
