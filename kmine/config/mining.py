"""Settings of mining: prompts, segmenter, its adaptation, gate, refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kmine.config.checks import fraction, require


@dataclass(frozen=True)
class PromptsConfig:
    """How local probabilities become prompts, one object per connected component."""

    source: Literal["local", "cascade", "auto"] = "local"
    """local: the local model's components. cascade: the same, and from round 2 on the hint remembers what the segmenter
    said the round before. auto: the segmenter proposes masks unprompted, the local model picks among them, and the
    segmenter is asked about what was picked; not with ellipse."""
    passes: int = 1
    """2: the segmenter is asked again, with the box and the mask of its own answer."""
    min_area_px: int = 20
    """Components smaller than this are dropped."""
    min_area_fraction: float = 0.0005
    """So are components smaller than this share of the image."""
    box: bool = True
    """Prompt with the box."""
    points: bool = False
    """Prompt with one point inside and, where there is room, one outside."""
    mask_hint: bool = True
    """Prompt with the local model's own logits."""
    box_margin: float = 0.05
    """The tight box grows by this share of its side, at least 2 px, clipped to the image."""
    seed_from_activation: bool = True
    """sks only: where an image has a lesion by its label and the model finds none, ask where its classifier looks."""
    num_jitters: int = 3
    """Shaken boxes per object, for the consistency evidence."""
    jitter: float = 0.1
    """Shake of each box edge, as a share of the side; at most 20 px of an image 1024 px long."""

    def __post_init__(self) -> None:
        require(
            self.box or self.points, "prompts.box, prompts.points", "at least one of them true", (self.box, self.points)
        )
        require(self.passes in (1, 2), "prompts.passes", "1 or 2", self.passes)
        require(self.min_area_px >= 1, "prompts.min_area_px", "at least 1", self.min_area_px)
        fraction(self.min_area_fraction, "prompts.min_area_fraction", closed_low=True)
        require(0 <= self.box_margin <= 1, "prompts.box_margin", "0 to 1", self.box_margin)
        require(0 <= self.num_jitters <= 16, "prompts.num_jitters", "0 to 16", self.num_jitters)
        require(0 <= self.jitter < 0.5, "prompts.jitter", "0 to below 0.5", self.jitter)


@dataclass(frozen=True)
class SegmenterConfig:
    """The promptable model."""

    name: str = "tiny"
    """tiny (ships with kmine, trained on procedural pictures alone), ellipse (inscribed in the box: the floor, no
    knowledge at all), sam_vit_b, sam_vit_l or sam_vit_h."""
    checkpoint: str | None = None
    """Weights of that architecture, original or fine-tuned (MedSAM, for one); default: tiny's own, or a download of the
    original SAM."""
    batch_size: int = 1
    """SAM only: images encoded at once; a CPU gains nothing from more than 1, a GPU wants 4 to 16, and is given half
    of what exceeds its memory."""
    cache_dir: str | None = None
    """SAM only: folder for embeddings, so that each image is encoded once for all rounds, seeds and runs; default:
    embeddings in $KMINE_CACHE, else in ~/.cache/kmine."""
    cache_gb: float = 20.0
    """SAM only: gigabytes that the embeddings may take on disk (2.1 MB an image in float16); those used least recently
    go first. 0 keeps none."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """SAM only: precision of embeddings, kept or not; float32 is exact and takes twice the space."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "segmenter.batch_size", "at least 1", self.batch_size)
        require(self.cache_dir != "", "segmenter.cache_dir", "a folder", self.cache_dir)
        require(0 <= self.cache_gb <= 1e6, "segmenter.cache_gb", "0 to a million gigabytes", self.cache_gb)
        dtypes = ("float16", "float32")
        require(self.cache_dtype in dtypes, "segmenter.cache_dtype", "float16 or float32", self.cache_dtype)


@dataclass(frozen=True)
class AdaptConfig:
    """Before round 1, the segmenter learns from the labeled images; those of the validation split decide whether."""

    enabled: bool = True
    """Adapt where the segmenter can be adapted; ellipse cannot."""
    folds: int = 3
    """Local models trained without a part of the labels each, so that every labeled image is prompted by a model
    that does not know it; 1 skips them and shakes true boxes only."""
    fold_steps: int = 300
    """Optimizer steps of each of these local models, at most those of round 0."""
    steps: int | None = None
    """Optimizer steps of the segmenter; default: what suits it."""
    batch_size: int | None = None
    """Objects per step; default: what suits the segmenter."""
    lr: float | None = None
    """Peak learning rate; default: what suits the segmenter."""
    val_every: int = 50
    """Steps between two checks on the validation images; the best check wins."""
    min_gain: float = 0.005
    """The adapted segmenter is used only if its mean IoU on the validation images is higher by at least this."""
    max_images: int = 100
    """At most so many labeled images, and so many of validation, are used: their embeddings are held in memory."""

    def __post_init__(self) -> None:
        require(self.folds >= 1, "adapt.folds", "at least 1", self.folds)
        for name in ("fold_steps", "val_every", "max_images"):
            require(getattr(self, name) >= 1, f"adapt.{name}", "at least 1", getattr(self, name))
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"adapt.{name}", "at least 1", value)
        require(self.lr is None or self.lr > 0, "adapt.lr", "a positive number", self.lr)
        require(self.min_gain >= 0, "adapt.min_gain", "0 or more", self.min_gain)


@dataclass(frozen=True)
class GateConfig:
    """Which masks may teach. Calibrated: by estimated Dice; else by thresholds on the evidence.

    A score that could not be had (NaN) is not judged.
    """

    mode: Literal["thresholds", "calibrated"] = "calibrated"
    """calibrated: what the evidence is worth is learnt on labeled images that went through the same steps as if they
    had no mask. thresholds, and calibrated with too few labels for that: the limits below decide."""
    target_dice: float = 0.85
    """calibrated: the accepted masks' mean Dice that is aimed at, and promised where the labels allow it; else their
    mean estimate reaches it."""
    confidence: float = 0.9
    """calibrated: of that promise."""
    margin: float = 0.03
    """calibrated: where the estimates of the segmenter's and the local model's mask differ by at least this, the better
    one is used as it is; else only what both say."""
    min_predicted_iou: float = 0.7
    """The segmenter's own estimate."""
    min_stability: float = 0.8
    """The segmenter's stability score."""
    min_agreement: float = 0.5
    """IoU with the local model's component."""
    min_jitter_dice: float = 0.7
    """Mean pairwise Dice over the shaken boxes."""
    min_confidence: float = 0.7
    """Mean local probability inside the mask."""
    max_confidence_outside: float = 0.5
    """Mean local probability in the box, outside the mask."""
    max_tta_std: float = 0.2
    """Mean deviation over test-time flips inside the mask."""
    max_area_ratio: float = 5.0
    """The mask's area may differ from the labeled median by this factor, up or down by its square."""

    def __post_init__(self) -> None:
        require(0 < self.target_dice < 1, "gate.target_dice", "between 0 and 1", self.target_dice)
        require(0.5 <= self.confidence < 1, "gate.confidence", "0.5 to below 1", self.confidence)
        require(0 <= self.margin <= 1, "gate.margin", "0 to 1", self.margin)
        for name in ("min_predicted_iou", "min_stability", "min_agreement", "min_jitter_dice", "min_confidence"):
            fraction(getattr(self, name), f"gate.{name}", closed_low=True)
        for name in ("max_confidence_outside", "max_tta_std"):
            fraction(getattr(self, name), f"gate.{name}", closed_low=True)
        require(self.max_area_ratio > 1, "gate.max_area_ratio", "a factor above 1", self.max_area_ratio)


@dataclass(frozen=True)
class RefineConfig:
    """From kept candidates to pseudo masks with ignore pixels."""

    min_vote: float = 0.75
    """Share of the answers (box and jitters) that must agree on a pixel, else it is ignored (255)."""
    ask_local: bool = True
    """Ignore pixels, too, where the local model and the segmenter's majority disagree; of objects for which the gate
    found one of the two masks better, that one counts instead."""

    def __post_init__(self) -> None:
        require(0.5 < self.min_vote <= 1, "refine.min_vote", "above 0.5, at most 1", self.min_vote)
