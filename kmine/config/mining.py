"""Settings of mining: prompts, segmenter, its adaptation, gate, refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kmine.config.checks import LocalPath, expand_paths, fraction, require


@dataclass(frozen=True)
class PromptsConfig:
    """How local probabilities become prompts, one object per connected component."""

    source: Literal["local", "cascade", "auto", "memory"] = "local"
    """local: components of the local model's prediction. cascade: the same; from round 2 on, the mask prompt is blended
    with the segmenter's mask of the round before. auto: the segmenter proposes masks without prompts, those that match
    the local model's probabilities become prompts; not with ellipse. memory: as auto, with masks that SAM 2 recalls
    from labeled images, or in volumes by tracking the clearest object through all slices; hf: models of SAM 2 only."""
    passes: int = 1
    """2: a second pass, prompted with box and mask of the first pass's result."""
    min_area_px: int = 20
    """Components smaller than this are dropped."""
    min_area_fraction: float = 0.0005
    """So are components smaller than this share of the image."""
    max_objects: int | None = 100
    """Objects of each class that are prompted in an image, the largest first; the pixels of others are ignored in
    training. null: all, which takes much memory where a hardly trained model finds thousands."""
    box: bool = True
    """Prompt with the box."""
    points: bool = False
    """Prompt with one point inside and, where there is room, one outside."""
    mask_hint: bool = True
    """Prompt with the local model's logits (SAM's mask_input)."""
    box_margin: float = 0.05
    """The tight box grows by this share of its side, at least 2 px, clipped to the image."""
    box_scales: tuple[float, ...] = (1.0,)
    """Boxes of each object, as multiples of the tight box, before the margin: [1.0, 1.2, 1.5] prompts three times. The
    mask that agrees best with all others is used; all of them vote, and are evidence of consistency."""
    doubtful: float | None = None
    """Also prompt, by box and without mask prompt, where the probability of a class reaches this but no object of it is
    found; with auto, where nothing is found, also at the most probable proposal from this on. Below 0.5, as 0.2;
    null: objects only."""
    seed_from_activation: bool = True
    """sks only: where the image label reports a lesion and the model finds none, prompt at the maximum of its
    classifier's class activation map."""
    num_jitters: int = 3
    """Jittered boxes per object, for the consistency evidence."""
    file: LocalPath | None = None
    """Boxes, points and scribbles that a person drew on images without masks: a CSV table (sample_id, class, box,
    points, background, scribble) or boxes in COCO's JSON. They take the place of the model's prompts for the same
    objects, and their masks are gated like all others. See docs/segmenters.md."""
    jitter: float = 0.1
    """Jitter of each box edge, as a share of the side; at most 20 px of an image 1024 px long."""

    def __post_init__(self) -> None:
        expand_paths(self)
        kinds = (self.box, self.points)
        require(any(kinds), "prompts.box, prompts.points", "at least one of them true", kinds)
        require(self.passes in (1, 2), "prompts.passes", "1 or 2", self.passes)
        require(self.min_area_px >= 1, "prompts.min_area_px", "at least 1", self.min_area_px)
        fraction(self.min_area_fraction, "prompts.min_area_fraction", closed_low=True)
        most = self.max_objects
        require(most is None or most >= 1, "prompts.max_objects", "at least 1, or null for all", most)
        require(0 <= self.box_margin <= 1, "prompts.box_margin", "0 to 1", self.box_margin)
        scales = self.box_scales
        are_valid = 1 <= len(scales) == len(set(scales)) <= 8 and all(1 <= scale <= 4 for scale in scales)
        require(are_valid, "prompts.box_scales", "1 to 8 different numbers from 1 to 4, as in [1.0, 1.2, 1.5]", scales)
        is_doubt = self.doubtful is None or 0 < self.doubtful < 0.5
        require(is_doubt, "prompts.doubtful", "a number above 0 and below 0.5, or null", self.doubtful)
        require(0 <= self.num_jitters <= 16, "prompts.num_jitters", "0 to 16", self.num_jitters)
        require(0 <= self.jitter < 0.5, "prompts.jitter", "0 to below 0.5", self.jitter)


ENCODING = ("sam", "medsam", "mobile_sam", "lite_medsam", "hf:")
"""How names of segmenters begin that have a large image encoder."""


@dataclass(frozen=True)
class SegmenterConfig:
    """The promptable model."""

    name: str = "tiny"
    """tiny (shipped with kmine, trained on procedural images only), ellipse (inscribed in the box; a floor without any
    learned knowledge), sam_vit_b, sam_vit_l, sam_vit_h, medsam, mobile_sam, lite_medsam; hf:OWNER/NAME, a model of
    Hugging Face transformers (hf:facebook/sam2.1-hiera-tiny), or hf:FOLDER; package.module:Class, or the name of a
    plug-in (docs/segmenters.md)."""
    checkpoint: LocalPath | None = None
    """Weights of that architecture, original or fine-tuned, in the original layout or that of Hugging Face; default:
    the shipped ones of tiny, or a download of the published ones (lite_medsam has none). Not with hf:."""
    batch_size: int = 1
    """Of large encoders only: images encoded at once, 1 on a CPU, 4 to 16 on a GPU; halved beyond the memory."""
    cache_dir: LocalPath | None = None
    """SAM only: folder for embeddings, so that each image is encoded once for all rounds, seeds and runs; default:
    embeddings in $KMINE_CACHE, else in ~/.cache/kmine."""
    cache_gb: float | None = None
    """SAM only: gigabytes of embeddings on disk (2.1 MB an image in float16); default: half of the free space. Those of
    other runs are removed first, the least recently used; images without room are encoded in each round. 0 keeps
    none."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """SAM only: precision of embeddings; float32 is exact and takes twice the space."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.batch_size >= 1, "segmenter.batch_size", "at least 1", self.batch_size)
        require(self.cache_dir != "", "segmenter.cache_dir", "a folder", self.cache_dir)
        is_size = self.cache_gb is None or 0 <= self.cache_gb <= 1e6
        require(is_size, "segmenter.cache_gb", "0 to a million gigabytes, or null", self.cache_gb)
        dtype = self.cache_dtype
        require(dtype in ("float16", "float32"), "segmenter.cache_dtype", "float16 or float32", dtype)


@dataclass(frozen=True)
class AdaptConfig:
    """Fine-tuning of the segmenter on the labeled images before round 1; used only if better on validation images."""

    enabled: bool = True
    """Fine-tune the segmenter where it can be; ellipse cannot."""
    folds: int = 3
    """Number of cross-fitting folds: each labeled image is prompted by a local model trained without it. 1 trains no
    fold model and jitters true boxes only; so do fewer than 20 labeled objects, which cannot calibrate the gate."""
    fold_steps: int | None = None
    """Optimizer steps of each fold model, at most those of round 0; default: as many. The gate is calibrated on these
    models' masks, so they should be as good as the one that mines. The price: `folds` trainings as long as round 0."""
    steps: int | None = None
    """Optimizer steps of the segmenter; default: by segmenter."""
    batch_size: int | None = None
    """Objects per step; default: by segmenter."""
    lr: float | None = None
    """Peak learning rate; default: by segmenter."""
    val_every: int = 50
    """Steps between two validations; the best one chooses the weights."""
    min_gain: float = 0.005
    """The adapted segmenter is used only if its mean IoU on the validation images is higher by at least this."""
    max_images: int = 100
    """Maximum of labeled and of validation images in use, since their embeddings are held in memory."""

    def __post_init__(self) -> None:
        require(self.folds >= 1, "adapt.folds", "at least 1", self.folds)
        for name in ("val_every", "max_images"):
            require(getattr(self, name) >= 1, f"adapt.{name}", "at least 1", getattr(self, name))
        for name in ("fold_steps", "steps", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"adapt.{name}", "at least 1", value)
        require(self.lr is None or self.lr > 0, "adapt.lr", "a positive number", self.lr)
        require(self.min_gain >= 0, "adapt.min_gain", "0 or more", self.min_gain)


@dataclass(frozen=True)
class GateConfig:
    """Selection of pseudo masks: calibrated by estimated Dice, or ranked by the evidence."""

    mode: Literal["calibrated", "ranked", "thresholds"] = "calibrated"
    """calibrated: estimate Dice from the evidence, fitted by cross-fitting on labeled images. ranked: keep the best
    objects by their evidence alone; also where there are too few labels to calibrate. thresholds: limits of older runs,
    whose results can be read; nothing is mined with it."""
    target_dice: float = 0.85
    """calibrated: target of the kept masks' mean Dice; guaranteed where the labels suffice, otherwise reached by the
    mean estimate."""
    confidence: float = 0.9
    """calibrated: confidence of that guarantee."""
    margin: float = 0.03
    """calibrated: where the estimated difference in Dice between the segmenter's and the local model's mask is at least
    this, the better mask is used; otherwise their intersection, other pixels being ignored."""
    keep: float = 0.5
    """ranked: share of the objects kept, the best by evidence. A dropped object is ignored, not called background, so a
    small share costs images, and a large one errors; half is our choice. 1 keeps every object and ranks none."""

    def __post_init__(self) -> None:
        require(0 < self.target_dice < 1, "gate.target_dice", "between 0 and 1", self.target_dice)
        require(0.5 <= self.confidence < 1, "gate.confidence", "0.5 to below 1", self.confidence)
        require(0 <= self.margin <= 1, "gate.margin", "0 to 1", self.margin)
        require(0 < self.keep <= 1, "gate.keep", "above 0, at most 1", self.keep)


@dataclass(frozen=True)
class RefineConfig:
    """From kept candidates to pseudo masks with ignored pixels."""

    min_vote: float = 0.75
    """Share of the candidates (box and jitters) that must agree on a pixel; otherwise it is ignored (255)."""
    ask_local: bool = True
    """Also ignore pixels where the local model and the segmenter's majority disagree; not in objects for which the gate
    prefers one of the two masks. A ranked gate always prefers the segmenter's: else no correction would be left."""
    doubt: float | None = 0.1
    """Outside all objects, pixels where the local model's foreground probability is from this to 0.5 are ignored, not
    background: they may be a lesion. Not in images known to be free of it. 0.5 or null: none are."""

    def __post_init__(self) -> None:
        require(0.5 < self.min_vote <= 1, "refine.min_vote", "above 0.5, at most 1", self.min_vote)
        is_share = self.doubt is None or 0 < self.doubt <= 0.5
        require(is_share, "refine.doubt", "above 0, at most 0.5, or null", self.doubt)
