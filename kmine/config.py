"""Settings, declared once: every default lives here and nowhere else.

Each dataclass is frozen and checks itself when built. `kmine.cli` turns them into flags (`--data.size 128`) and
YAML keys of the same names; the string under a field is its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from kmine.records import UserError

PhantomKind = Literal["polyp", "ct", "xray"]
COVID_CLASSES = ("COVID-19", "Non-COVID", "Normal")


def _require(condition: bool, field_name: str, expected: str, came: object) -> None:
    if not condition:
        raise UserError(f"{field_name}: expected {expected}, got {came!r}")


def _fraction(value: float, name: str, *, closed_low: bool = False) -> None:
    ok = (0 <= value <= 1) if closed_low else (0 < value <= 1)
    _require(ok, name, f"a fraction in {'[' if closed_low else '('}0, 1]", value)


def _is_range(limits: tuple[float, float]) -> bool:
    return len(limits) == 2 and all(map(math.isfinite, limits)) and limits[0] < limits[1]


def _is_count(value: float) -> bool:
    return value >= 1 and float(value).is_integer()


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are split, how they are read."""

    name: str = "phantom"
    """Data set: phantom (procedural, no files needed), kvasir_seg, lits or covid_qu_ex."""
    root: str | None = None
    """Folder that holds the data set as downloaded; not used by phantom."""
    kind: PhantomKind = "polyp"
    """Phantom only: what the procedural images look like."""
    num_samples: int = 400
    """Phantom only: how many images to generate."""
    task: Literal["auto", "tumour", "liver", "both", "lung", "infection"] = "auto"
    """What is segmented. LiTS: tumour (auto), liver (with its tumours), both (two classes, liver beside tumour);
    COVID-QU-Ex: infection (auto), lung. The other data sets have one task."""
    classes: tuple[str, ...] = COVID_CLASSES
    """COVID-QU-Ex only: which of its class folders are read."""
    slices: Literal["all", "liver"] = "all"
    """LiTS only: all axial slices, or those that show liver (by the mask, or those that image_labels lists)."""
    every_nth: int = 1
    """LiTS only: of each volume only the slices 0, n, 2n and so on."""
    window: tuple[float, float] = (-160.0, 240.0)
    """LiTS only: Hounsfield units shown as black and as white, as in [-160, 240]; the same for every slice."""
    image_labels: str | None = None
    """LiTS only: CSV of sample_id,label (0 or 1: no lesion, lesion). Masks of volumes listed there are not asked."""
    normal_images: str | None = None
    """Kvasir-SEG only: folder of images without a polyp; they join as unlabeled ones of which this much is known."""
    size: int = 96
    """Side in pixels of the square the local model sees; images are resized, metrics stay in the native frame."""
    label_fraction: float = 0.05
    """Share of the training images whose masks are used; nested: the images of 0.1 are among those of 0.25."""
    fine_groups: float | None = None
    """Instead of label_fraction: use the masks of so many training groups (volumes), or below 1 of this share of them.

    All other training images keep their image-level label at most."""
    val_fraction: float = 0.1
    """Share of the images with masks that is used for validation."""
    test_fraction: float = 0.25
    """Share of the images with masks that is held back for the test split."""
    split_seed: int = 0
    """Draws validation and test; `--seed` draws the labeled images, so that seeds share one test split."""
    duplicate_distance: int = 6
    """Images whose 64-bit perceptual hashes differ in at most this many bits form one group; -1 switches it off.

    It finds re-exported images, not images of the same patient."""
    on_error: Literal["stop", "skip"] = "stop"
    """A damaged file: stop with one clear error, or skip it, counted and listed in run.json."""
    cache_dir: str | None = None
    """Folder for decoded images, shared by runs; default: $KMINE_CACHE, else ~/.cache/kmine."""

    def __post_init__(self) -> None:
        _require(self.root != "", "data.root", "a folder", self.root)
        _require(self.num_samples >= 1, "data.num_samples", "at least 1", self.num_samples)
        _require(32 <= self.size <= 4096, "data.size", "32 to 4096 pixels", self.size)
        _require(self.every_nth >= 1, "data.every_nth", "at least 1", self.every_nth)
        _require(_is_range(self.window), "data.window", "two rising numbers of Hounsfield units", self.window)
        _require(self.image_labels != "", "data.image_labels", "a CSV file", self.image_labels)
        _require(self.normal_images != "", "data.normal_images", "a folder", self.normal_images)
        known = set(self.classes) <= set(COVID_CLASSES) and 0 < len(self.classes) == len(set(self.classes))
        _require(known, "data.classes", f"some of {', '.join(COVID_CLASSES)}, each once", self.classes)
        _require(
            self.fine_groups is None or 0 < self.fine_groups < 1 or _is_count(self.fine_groups),
            "data.fine_groups",
            "a whole number of groups from 1, or a share between 0 and 1",
            self.fine_groups,
        )
        _fraction(self.label_fraction, "data.label_fraction")
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"data.{name}", "a fraction in [0, 1)", value)
        _require(
            self.val_fraction + self.test_fraction < 1,
            "data.val_fraction + data.test_fraction",
            "less than 1, so that training images remain",
            self.val_fraction + self.test_fraction,
        )
        _require(
            -1 <= self.duplicate_distance <= 63, "data.duplicate_distance", "-1 to 63 bits", self.duplicate_distance
        )


@dataclass(frozen=True)
class ModelConfig:
    """The local model."""

    name: str = "unetpp"
    """Local model: unetpp, unet or sks (a classifier of image-level labels guides a U-Net)."""
    encoder: str = ""
    """Any encoder of segmentation-models-pytorch by name, or tu-NAME for a timm encoder; default: mobilenet_v2.

    sks takes timm names, with or without tu-; default: swinv2_tiny_window8_256, as in its paper, which wants a GPU.
    For a CPU: mobilenetv2_050 or mobilenetv3_small_050."""
    encoder_weights: str | None = None
    """Start of the encoder: none (random), `hub` (ImageNet weights, downloaded) or a local .safetensors file."""
    encoder_depth: int = 4
    """Not for sks: number of encoder levels, 3 to 5; input sides are padded to a multiple of 2 ** depth."""
    decoder_channels: int = 64
    """Channels of the deepest decoder level; halved at each level above, at least 8."""
    normalization: Literal["half", "imagenet"] = "half"
    """Input scaling inside the model: half is x / 127.5 - 1; imagenet uses ImageNet's channel means and deviations."""
    levels: Literal[3, 4] = 4
    """sks only: levels of its pyramids, at strides 4, 8, 16 and, with 4 of them, 32."""
    skip_feature_share: bool = True
    """sks only: the classifier's features are fused into the fine encoder, before its next stage reads them."""
    skip_resolution: bool = True
    """sks only: the decoder gets the fused features of each level; off: the fine encoder's own."""
    skip_coarse: bool = True
    """sks only: the classifier's features are fused once more into what the decoder gets. All three off: a U-Net."""
    freeze_coarse: bool = True
    """sks only: the classifier stays as its own training left it while the segmentation is trained."""

    def __post_init__(self) -> None:
        _require(3 <= self.encoder_depth <= 5, "model.encoder_depth", "3, 4 or 5", self.encoder_depth)
        _require(self.decoder_channels >= 8, "model.decoder_channels", "at least 8", self.decoder_channels)
        _require(self.levels in (3, 4), "model.levels", "3 or 4", self.levels)

    def resolved(self) -> ModelConfig:
        """The same, the encoder that an empty `encoder` stands for filled in."""
        default = "swinv2_tiny_window8_256" if self.name == "sks" else "mobilenet_v2"
        return self if self.encoder else replace(self, encoder=default)


@dataclass(frozen=True)
class ClassifierConfig:
    """sks only: its classifier learns from the image-level labels, before round 0."""

    steps: int = 300
    """Optimizer steps; the best AUC on the validation images chooses the checkpoint."""
    batch_size: int = 16
    """Images per step, half of them with a lesion."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; what else there is to set, `fit` says."""
    shuffle: bool = False
    """Control arm: the training images' labels are dealt out anew at random, so that they say nothing."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "classifier.steps", "at least 1", self.steps)
        _require(self.batch_size >= 2, "classifier.batch_size", "at least 2 (one of each label)", self.batch_size)
        _require(self.lr > 0, "classifier.lr", "a positive number", self.lr)


@dataclass(frozen=True)
class FitConfig:
    """Training of the local model; budgets are optimizer steps, so that methods compare at equal cost."""

    steps: int = 600
    """Optimizer steps of round 0, on the labels alone."""
    round_steps: int = 300
    """Optimizer steps of every later round, and of the supervised baseline beside it."""
    batch_size: int = 8
    """Images per step."""
    labeled_share: float = 0.5
    """Share of each batch drawn from the labeled images; the rest are pseudo-labeled."""
    lr: float = 1e-3
    """Peak learning rate of AdamW in round 0."""
    round_lr: float = 1e-3
    """The same in every later round. A model from scratch is still learning then; a pretrained one wants less."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of the steps with rising learning rate; cosine decay to zero follows."""
    dice_weight: float = 1.0
    """Weight of soft Dice beside cross-entropy."""
    augment: bool = True
    """Flips, shifts, scaling, rotation, brightness, contrast, blur and noise."""
    val_every: int = 100
    """Steps between two validations; also how much training a kill can cost."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """auto: bf16 on GPUs that have it, 32 on a CPU (where bf16 can be 80 times slower)."""
    num_workers: int = 0
    """Processes that read and augment; 0: one thread beside the training."""

    def __post_init__(self) -> None:
        for name in ("steps", "round_steps", "val_every"):
            _require(getattr(self, name) >= 1, f"fit.{name}", "at least 1", getattr(self, name))
        _require(self.batch_size >= 2, "fit.batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        _fraction(self.labeled_share, "fit.labeled_share")
        for name in ("lr", "round_lr"):
            _require(getattr(self, name) > 0, f"fit.{name}", "a positive number", getattr(self, name))
        _require(self.weight_decay >= 0, "fit.weight_decay", "0 or more", self.weight_decay)
        _require(0 <= self.warmup < 1, "fit.warmup", "a share in [0, 1)", self.warmup)
        _require(self.dice_weight >= 0, "fit.dice_weight", "0 or more", self.dice_weight)
        _require(self.num_workers >= 0, "fit.num_workers", "0 or more", self.num_workers)


@dataclass(frozen=True)
class InferConfig:
    """Prediction with the local model."""

    batch_size: int = 16
    """Images per forward pass."""
    tta: Literal["none", "hflip", "flips"] = "flips"
    """Test-time augmentation when mining: none, mirror image, or all four flips; validation never uses it."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "infer.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class PromptsConfig:
    """How local probabilities become prompts, one object per connected component."""

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
        _require(
            self.box or self.points, "prompts.box, prompts.points", "at least one of them true", (self.box, self.points)
        )
        _require(self.min_area_px >= 1, "prompts.min_area_px", "at least 1", self.min_area_px)
        _fraction(self.min_area_fraction, "prompts.min_area_fraction", closed_low=True)
        _require(0 <= self.box_margin <= 1, "prompts.box_margin", "0 to 1", self.box_margin)
        _require(0 <= self.num_jitters <= 16, "prompts.num_jitters", "0 to 16", self.num_jitters)
        _require(0 <= self.jitter < 0.5, "prompts.jitter", "0 to below 0.5", self.jitter)


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
    """SAM only: images encoded at once; a SAM ViT-B at 1024 px takes 3.5 GB an image on a CPU, a GPU wants 4 to 16."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "segmenter.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class AdaptConfig:
    """Before round 1, the segmenter learns from the labeled images; those of the validation split decide whether."""

    enabled: bool = True
    """Adapt where the segmenter can be adapted; ellipse cannot."""
    folds: int = 3
    """Local models trained without a part of the labels each, so that every labeled image is prompted by a model
    that does not know it; 1 skips them and shakes true boxes only."""
    fold_steps: int = 300
    """Optimizer steps of each of these local models."""
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
        _require(self.folds >= 1, "adapt.folds", "at least 1", self.folds)
        for name in ("fold_steps", "val_every", "max_images"):
            _require(getattr(self, name) >= 1, f"adapt.{name}", "at least 1", getattr(self, name))
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"adapt.{name}", "at least 1", value)
        _require(self.lr is None or self.lr > 0, "adapt.lr", "a positive number", self.lr)
        _require(self.min_gain >= 0, "adapt.min_gain", "0 or more", self.min_gain)


@dataclass(frozen=True)
class GateConfig:
    """Thresholds on the evidence; a score that could not be had (NaN) is not judged."""

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
        for name in ("min_predicted_iou", "min_stability", "min_agreement", "min_jitter_dice", "min_confidence"):
            _fraction(getattr(self, name), f"gate.{name}", closed_low=True)
        for name in ("max_confidence_outside", "max_tta_std"):
            _fraction(getattr(self, name), f"gate.{name}", closed_low=True)
        _require(self.max_area_ratio > 1, "gate.max_area_ratio", "a factor above 1", self.max_area_ratio)


@dataclass(frozen=True)
class RefineConfig:
    """From kept candidates to pseudo masks with ignore pixels."""

    min_vote: float = 0.75
    """Share of the answers (box and jitters) that must agree on a pixel, else it is ignored (255)."""
    ask_local: bool = True
    """Ignore pixels, too, where the local model and the segmenter's majority disagree."""

    def __post_init__(self) -> None:
        _require(0.5 < self.min_vote <= 1, "refine.min_vote", "above 0.5, at most 1", self.min_vote)


@dataclass(frozen=True)
class LoopConfig:
    """Everything `python -m kmine.loop` can be told."""

    rounds: int = 3
    """Mining rounds after round 0; 0 is plain supervised training."""
    seed: int = 0
    """Draws the labeled images, initial weights, batches, augmentation and jitter."""
    out: str = "runs/phantom"
    """Run folder; the same command again resumes there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offline: bool = False
    """Forbid every download; a missing file is then an error."""
    baseline: bool = True
    """Also train the supervised baseline for the same number of steps, for the report."""
    adopt_tolerance: float = 0.01
    """A round is adopted unless validation Dice falls by more than this."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.model.resolved())
        _require(bool(self.out), "out", "a folder", self.out)
        _require(self.rounds >= 0, "rounds", "0 or more", self.rounds)
        _require(0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1", self.seed)
        _require(self.adopt_tolerance >= 0, "adopt_tolerance", "0 or more", self.adopt_tolerance)
