"""Settings of the local model: the network, its training, its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kmine.config.checks import LocalPath, expand_paths, fraction, require
from kmine.errors import unknown_name
from kmine.io.errors import expanded

Channels = tuple[float, float, float]
SCALINGS: dict[str, tuple[Channels, Channels]] = {
    "half": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    "satellite": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "unit": ((0.0,) * 3, (1.0,) * 3),
}
"""Mean and deviation of RGB in [0, 1] that pretrained encoders expect, by name: all that timm 1.0 publishes."""
DEFAULT_ENCODERS = {"sks": "swinv2_tiny_window8_256", "dpt": "tu-vit_small_patch14_dinov2"}
_PAIRED = ("name", "encoder", "encoder_weights", "encoder_sha256", "normalization")
"""Settings with a value for each of two models joined by +."""


@dataclass(frozen=True)
class ModelConfig:
    """The local model."""

    name: str = "unetpp"
    """Local model: unetpp, unet, dpt (a plain vision transformer with the decoder of DPT, for DINOv2 and DINOv3) or sks
    (a U-Net guided by a classifier of image-level labels). Two joined by +, as in unetpp+sks: the second is an
    auxiliary model, trained once on the labels only; its agreement is evidence for the gate. encoder and
    encoder_weights may then be pairs, too: A+B."""
    encoder: str = ""
    """Any encoder of segmentation-models-pytorch by name, or tu-NAME for a timm encoder; default: mobilenet_v2. sks
    takes timm names, with or without tu-; default: swinv2_tiny_window8_256, as in its paper, for a GPU. For a CPU:
    mobilenetv2_050 or mobilenetv3_small_050. dpt takes vision transformers of timm; default:
    tu-vit_small_patch14_dinov2."""
    encoder_weights: LocalPath | None = "auto"
    """Initial weights of the encoder: none (random), hub (ImageNet, downloaded), a local .safetensors file, or auto:
    those that a cache of kmine, Hugging Face or PyTorch holds, without a download, else random ones. A run records the
    file, and keeps to it when resumed."""
    encoder_sha256: str | None = None
    """SHA-256 (hex) of the file of encoder weights; a run records it, and refuses another file."""
    encoder_depth: int = 4
    """For unet and unetpp: number of encoder levels, 3 to 5; input sides are padded to a multiple of 2 ** depth."""
    decoder_width: int = 8
    """Channels of the decoder at full resolution, doubled at each stride below: 8 at stride 1, 16 at stride 2, and so
    on, equally for all models. 16 is the width of segmentation-models-pytorch."""
    decoder_channels: int | None = None
    """The rule of older runs, in place of decoder_width: channels of the deepest decoder level, halved at each level
    above, at least 8."""
    normalization: str = "auto"
    """Input scaling inside the model: half (x / 127.5 - 1), imagenet (ImageNet's channel means and deviations), clip,
    dpn, satellite or unit ([0, 1]); auto: that of the encoder weights, half without weights."""
    force_normalization: bool = False
    """Allow a normalization for which the encoder weights were clearly not made."""
    levels: Literal[3, 4] = 3
    """sks only: levels of its pyramids, at strides 4, 8, 16 and, with 4 of them, 32."""
    decoder: Literal["unet", "unetpp"] = "unetpp"
    """sks only: decoder of its fine branch: that of U-Net++, or a plain one."""
    skip_feature_share: bool = True
    """sks only: fuse the classifier's features into the fine encoder, before its next stage."""
    skip_resolution: bool = True
    """sks only: pass the fused features of each level to the decoder; off: the fine encoder's own."""
    skip_coarse: bool = True
    """sks only: fuse the classifier's features again into the decoder's input. All three off: the fine branch alone."""
    freeze_coarse: bool = True
    """sks only: freeze the classifier while the segmentation is trained."""
    fine_init: Literal["weights", "classifier"] = "weights"
    """sks only: what the fine encoder starts from: encoder_weights, or the trained classifier's encoder."""
    veto: bool = True
    """sks only: an image in which the classifier sees no lesion gets an empty mask. Its verdict is calibrated on the
    validation images after each training, and is not used where these do not support it."""

    def __post_init__(self) -> None:
        if self.has_auxiliary and self.encoder_weights is not None:
            both = [str(expanded(path)) for path in self.encoder_weights.split("+", 1)]
            object.__setattr__(self, "encoder_weights", "+".join(both))
        expand_paths(self)
        require(3 <= self.encoder_depth <= 5, "model.encoder_depth", "3, 4 or 5", self.encoder_depth)
        require(self.decoder_width >= 1, "model.decoder_width", "at least 1", self.decoder_width)
        channels = self.decoder_channels
        require(channels is None or channels >= 8, "model.decoder_channels", "at least 8, or null", channels)
        self._check_normalization()
        require(self.levels in (3, 4), "model.levels", "3 or 4", self.levels)
        for name, value in {"name": self.name, "encoder": self.encoder if self.has_auxiliary else ""}.items():
            require(value.count("+") <= 1, f"model.{name}", "one, or two joined by +", value)

    def _check_normalization(self) -> None:
        parts = self.normalization.split("+", 1) if self.has_auxiliary else [self.normalization]
        for part in parts:
            if part not in ("auto", *SCALINGS):
                raise unknown_name("model.normalization", part, ("auto", *SCALINGS))

    @property
    def is_pretrained(self) -> bool:
        """Whether the encoder begins with given weights; `auto` that no run has resolved stands for random ones."""
        return self.encoder_weights not in (None, "none", "auto")

    def signed_fields(self) -> dict[str, Any]:
        """Settings that enter signatures: for the path of the weights their SHA-256, if it is known."""
        fields = asdict(self)
        sha256, _ = fields.pop("encoder_sha256"), fields.pop("force_normalization")
        return fields | ({"encoder_weights": sha256} if sha256 else {})

    @property
    def has_auxiliary(self) -> bool:
        """Whether `name` names two models."""
        return "+" in self.name

    def split(self) -> tuple[ModelConfig, ModelConfig | None]:
        """Settings of the local model and of the auxiliary model, if any; single values apply to both."""
        if not self.has_auxiliary:
            return self, None
        first, second = {}, {}
        for name in _PAIRED:
            value = getattr(self, name)
            parts = [None] if value is None else value.split("+", 1)
            first[name], second[name] = parts[0], parts[-1]
        for values in (first, second):
            values["encoder_sha256"] = values["encoder_sha256"] or None
        return replace(self, **first).resolved(), replace(self, **second).resolved()

    def with_architecture(self, name: str) -> ModelConfig:
        """The network `name`, unet or unetpp, with this model's encoder; of sks its fine branch alone, which it is."""
        if self.name != "sks":
            return replace(self, name=name)
        skips = dict.fromkeys(("skip_feature_share", "skip_resolution", "skip_coarse"), False)
        return replace(self, decoder=name, fine_init="weights", veto=False, **skips)

    def joined(self, parts: Sequence[ModelConfig]) -> ModelConfig:
        """Copy with the weights and scalings of `parts`, this model or the two of `split`."""
        absent = {"encoder_weights": "none", "encoder_sha256": ""}
        values: dict[str, Any] = {}
        for name in _PAIRED[2:]:
            own = [getattr(part, name) for part in parts]
            values[name] = own[0] if len(set(own)) == 1 else "+".join(value or absent[name] for value in own)
        return replace(self, **values)

    def resolved(self) -> ModelConfig:
        """Copy with the default encoder in place of an empty `encoder`, and `OF_SKS` where no model is sks."""
        default = {"sks": "swinv2_tiny_window8_256", "dpt": "tu-vit_small_patch14_dinov2"}.get(
            self.name, "mobilenet_v2"
        )
        encoder = "+".join(m.encoder for m in self.split() if m) if self.has_auxiliary else self.encoder or default
        return replace(self, encoder=encoder, **({} if "sks" in self.name.split("+") else OF_SKS))


OF_SKS = {"levels": 4, "decoder": "unet", "fine_init": "weights", "veto": False}
"""Settings of sks as other models have them: without effect, and equal in all runs of these models, old and new."""


@dataclass(frozen=True)
class ClassifierConfig:
    """sks only: training of its classifier on image-level labels, before round 0."""

    steps: int = 500
    """Largest number of optimizer steps. The weights of the last are used, unless the validation AUC fell by more than
    0.05: with few images an AUC near 1 does not tell 100 steps of training from 500."""
    patience: int = 0
    """Training ends after as many validations (every fit.val_every steps) without a rise of the AUC; 0: after steps."""
    batch_size: int = 16
    """Images per step, half of them with a lesion."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; all other training settings are those of fit."""
    shuffle: bool = False
    """Control experiment: permute the training images' labels at random."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "classifier.steps", "at least 1", self.steps)
        require(self.patience >= 0, "classifier.patience", "0 or more", self.patience)
        require(self.batch_size >= 2, "classifier.batch_size", "at least 2 (one of each label)", self.batch_size)
        require(self.lr > 0, "classifier.lr", "a positive number", self.lr)


@dataclass(frozen=True)
class FitConfig:
    """Training of the local model; budgets are optimizer steps, so methods are compared at equal cost."""

    steps: int = 600
    """Optimizer steps of round 0, on the labels alone."""
    round_steps: int = 300
    """Optimizer steps of every later round, and of the supervised baseline."""
    batch_size: int = 8
    """Images per step."""
    labeled_share: float = 0.5
    """Share of each batch drawn from the labeled images; the rest are pseudo-labeled."""
    lr: float = 1e-3
    """Peak learning rate of AdamW in round 0."""
    round_lr: float = 1e-3
    """Peak learning rate in every later round; lower suits a pretrained model."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of the steps with linearly rising learning rate; cosine decay to zero follows."""
    decay_norms: bool = False
    """Weight decay on norms and biases, too."""
    encoder_lr: float = 1.0
    """Learning rate of the encoder as a share of lr; 0: frozen, but for its norms' statistics."""
    clip_grad: float = 1.0
    """Largest norm of the gradient, to which longer ones are scaled; 0: no limit."""
    dice_weight: float = 1.0
    """Weight of soft Dice beside cross-entropy."""
    dice: Literal["auto", "image", "batch"] = "auto"
    """image: soft Dice of each image and class, averaged over the images that show the class (others count in
    cross-entropy only). batch: of the batch as if it were one image, so that false alarms on lesion-free images count.
    auto: batch where a labeled training image is lesion-free, else image."""
    augment: bool = True
    """Flips, shifts, scaling, rotation, brightness, contrast, blur and noise."""
    flips: Literal["auto", "none", "horizontal", "both"] = "auto"
    """Mirror images in training. auto: by the data set: none for chest X-rays, where left and right differ, else
    horizontal."""
    rotation: float | None = None
    """Largest rotation in training in degrees; default by the data set: 180 for polyps, 15 for CT, 10 for chest
    X-rays, 30 for your own files."""
    scale: tuple[float, float] | None = None
    """Smallest and largest magnification in training; default by the data set: [0.6, 1.6] for polyps, else
    [0.8, 1.25]."""
    supersample: int = 1
    """Training images are turned and magnified at so many times the input size, in the finer pixels of the files, and
    then reduced; takes a cache of that size."""
    strong_augment: bool = False
    """Stronger colour, blur, noise and grey conversion for pseudo-labeled images; labeled ones use augment."""
    cutmix: float = 0.0
    """Probability that a rectangle of another image, with mask and weight, is pasted into an image; 0: never."""
    feature_perturbation: float = 0.0
    """Share of encoder channels dropped before the decoder, for pseudo-labeled images only; 0: none."""
    pseudo_weight: Literal["equal", "estimated"] = "equal"
    """Weight of a pseudo-labeled image: 1, or the estimated Dice of its mask (1 without an estimate)."""
    clean_share: float = 0.0
    """Largest share of each batch that is drawn from unlabeled images known to be lesion-free by their image-level
    label, with an empty mask, where training has no pseudo masks (round 0, the supervised baseline); 0: none."""
    max_empty_share: float = 0.25
    """Largest share of lesion-free images among the pseudo-labeled ones in training, unless all are."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights (as in 0.99), which is then validated and kept; 0: off."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights that are used: last: those of the last step, unless validation shows that the training diverged (a fall
    of the score by more than 0.05 and by more than noise; with fewer than 20 images to less than half); best: those of
    the best validation."""
    val_every: int = 100
    """Steps between two validations; a kill costs at most so many, or a minute of training."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """auto: bf16 on GPUs and CPUs that have it in hardware (CPU: AMX), else 16 on a GPU, 32 on a CPU."""
    num_workers: int = 0
    """Worker processes that read and augment; 0: one thread. Their batches are in shared memory (docker run
    --shm-size)."""

    def __post_init__(self) -> None:
        for name in ("steps", "round_steps", "val_every"):
            require(getattr(self, name) >= 1, f"fit.{name}", "at least 1", getattr(self, name))
        require(self.batch_size >= 2, "fit.batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        fraction(self.labeled_share, "fit.labeled_share")
        for name in ("lr", "round_lr"):
            require(getattr(self, name) > 0, f"fit.{name}", "a positive number", getattr(self, name))
        require(self.weight_decay >= 0, "fit.weight_decay", "0 or more", self.weight_decay)
        require(0 <= self.warmup < 1, "fit.warmup", "a share in [0, 1)", self.warmup)
        for name in ("dice_weight", "clip_grad"):
            require(getattr(self, name) >= 0, f"fit.{name}", "0 or more", getattr(self, name))
        require(self.encoder_lr >= 0, "fit.encoder_lr", "0 or more", self.encoder_lr)
        require(self.rotation is None or 0 <= self.rotation <= 180, "fit.rotation", "0 to 180 degrees", self.rotation)
        are_valid = self.scale is None or (0 < self.scale[0] <= self.scale[1] and math.isfinite(self.scale[1]))
        require(are_valid, "fit.scale", "two numbers above 0, the smaller first, as in [0.8, 1.25]", self.scale)
        strong = self.strong_augment
        require(self.augment or not strong, "fit.strong_augment", "false where fit.augment is false", strong)
        require(0 <= self.clean_share < 1, "fit.clean_share", "0 to below 1", self.clean_share)
        for name in ("cutmix", "max_empty_share"):
            fraction(getattr(self, name), f"fit.{name}", closed_low=True)
        for name in ("feature_perturbation", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"fit.{name}", "0 to below 1", getattr(self, name))
        kinds = ("equal", "estimated")
        require(self.pseudo_weight in kinds, "fit.pseudo_weight", " or ".join(kinds), self.pseudo_weight)
        require(1 <= self.supersample <= 4, "fit.supersample", "1 to 4", self.supersample)
        require(self.num_workers >= 0, "fit.num_workers", "0 or more", self.num_workers)

    def signed_fields(self) -> dict[str, Any]:
        """Settings that enter signatures: all but the number of workers and those of rounds after round 0."""
        return {k: v for k, v in asdict(self).items() if k not in ("num_workers", "round_steps", "round_lr")}

    def labels_only(self) -> FitConfig:
        """Copy with the settings of pseudo masks at their defaults, since they have no effect without pseudo masks."""
        names = ("strong_augment", "feature_perturbation", "pseudo_weight", "max_empty_share", "labeled_share")
        return replace(self, **{name: getattr(FitConfig, name) for name in names})


@dataclass(frozen=True)
class InferConfig:
    """Prediction with the local model."""

    batch_size: int = 16
    """Images per forward pass."""
    tta: Literal["auto", "none", "hflip", "flips"] = "auto"
    """Test-time augmentation when mining: none, mirror image (hflip), or all four flips; auto: the flips of training
    (fit.flips). Never in validation."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "infer.batch_size", "at least 1", self.batch_size)
