"""What a report is made of: plain values that a caller fills in, no reading of runs here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.types import Prompts, Skipped

Category = Literal["best", "worst", "dropped"]
CATEGORIES: tuple[Category, ...] = ("best", "worst", "dropped")
"""The gallery shows them in this order. No truth is involved: best and worst are by the gate's scores."""


@dataclass(frozen=True)
class RoundRow:
    """One round: the numbers of every table and chart. A float may be NaN where there is no number."""

    round_idx: int
    num_labeled: int
    num_pseudo: int
    dice: float
    """Mean per-case Dice on validation, of the checkpoint chosen on it; so are `iou`, `hd95` and `num_missed`."""
    iou: float
    hd95: float
    num_missed: int
    dice_final: float
    """Mean per-case Dice on validation, of the last step's checkpoint."""
    adopted: bool
    supervised_dice: float | None = None
    """The supervised baseline after as many optimizer steps, checkpoint chosen on validation; None: no baseline."""
    supervised_dice_final: float | None = None
    coverage: float = float("nan")
    """Share of the unlabeled images that have a pseudo mask."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Objects by the gate's reason; empty in round 0."""
    changed_pixels: float | None = None
    """Of the pixels of kept objects, the share on which the local and the used mask differ: 0 is self-training."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per stage."""
    supervised_adopted: bool | None = None
    """Whether the baseline, under the same rule, adopted this round; None: not known."""
    reason: str = "adopted"
    """`adopted`, or `refused: ` and why; of the loop, not of the baseline."""
    difference: float = float("nan")
    """Mean over the validation images of Dice minus that of the last adopted round."""
    difference_low: float = float("nan")
    """Lower end of its 90 % interval."""
    difference_high: float = float("nan")
    """Upper end, likewise."""
    num_new: int | None = None
    """Images that teach for the first time; None in round 0, as are the next two."""
    num_readmitted: int | None = None
    """Images that taught before, but not in the round before."""
    num_expelled: int | None = None
    """Images that taught in the round before and do not now."""
    taught_pixels: float | None = None
    """Share of the pixels of `changed_pixels` that is taught otherwise than the local model had it."""
    ignored_pixels: float | None = None
    """Share of all pixels of the pseudo masks that is ignored."""


@dataclass(frozen=True)
class GalleryItem:
    """One mined image with every step of its mining. H, W: the image's own frame."""

    category: Category
    sample_id: str
    round_idx: int
    reason: str
    """The gate's reason; of several objects, the one that decided."""
    scores: dict[str, float]
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    prompts: list[Prompts]
    local_mask: NDArray[np.uint8]
    """(H, W) class ids of the local model."""
    segmenter_mask: NDArray[np.uint8]
    """(H, W) class ids of the segmenter's answers united."""
    pseudo_mask: NDArray[np.uint8] | None = None
    """(H, W) class ids with 255 = ignore; None where nothing was kept."""

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category must be one of {CATEGORIES}, got {self.category!r}")
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(f"image must be (H, W, 3) uint8, got {self.image.shape} {self.image.dtype}")
        for name in ("local_mask", "segmenter_mask", "pseudo_mask"):
            mask = getattr(self, name)
            if mask is not None and (mask.shape != self.image.shape[:2] or mask.dtype != np.uint8):
                expected = self.image.shape[:2]
                raise ValueError(f"{name} must be {expected} uint8 like the image, got {mask.shape} {mask.dtype}")


@dataclass(frozen=True)
class Calibrated:
    """How good the gate's estimates are, on labeled objects that nothing was taught with."""

    risk_coverage: list[tuple[float, float]]
    """(share accepted, their mean Dice), the most trusted first."""
    reliability: list[tuple[float, float, int]]
    """(mean estimate, mean Dice, count) of bins."""
    coverage: float
    """Share of the objects that the gate accepts."""
    target: float
    """Mean Dice that is aimed at."""


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    title: str
    dataset: str
    model: str
    segmenter: str
    command: str
    rounds: list[RoundRow]
    gallery: list[GalleryItem] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    """Git commit, versions, seed, device, fingerprints, why the run stopped, ..."""
    config_yaml: str = ""
    notes: list[str] = field(default_factory=list)
    """Plain sentences a reader must know, such as that the segmenter is a stand-in."""
    skipped: list[Skipped] = field(default_factory=list)
    validation_cases: int = 0
    calibration: Calibrated | None = None
    """None where the gate is not calibrated."""
