"""Settings, declared once with their defaults.

Each dataclass is frozen and checked when built. `kmine.cli` turns fields into flags (`--data.size 128`) and YAML keys
of the same names; the string under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kmine.config.checks import LocalPath, expand_paths, require
from kmine.config.data import DataConfig
from kmine.config.methods import FixmatchConfig, TeacherConfig, UnimatchConfig
from kmine.config.mining import AdaptConfig, GateConfig, PromptsConfig, RefineConfig, SegmenterConfig
from kmine.config.model import ClassifierConfig, FitConfig, InferConfig, ModelConfig

DATA_SETTINGS = ("data.name", "data.root", "data.images", "data.masks", "data.csv", "data.class_names", "data.window")
"""Those of the short help that tell where the data lie and how they are read."""
MAIN_SETTINGS = (
    *("rounds", "seed", "out", "device", "plan_minutes"),
    *DATA_SETTINGS,
    *("data.label_fraction", "data.folds", "model.name", "model.encoder_weights", "segmenter.name"),
    "segmenter.checkpoint",
)
"""Those of the short help of `kmine loop`."""
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class LoopConfig:
    """Settings of `python -m kmine.loop`."""

    rounds: int = 3
    """Mining rounds after round 0; 0 is plain supervised training."""
    seed: int = 0
    """Seed of the labeled subset, initial weights, batches, augmentation and jitter."""
    out: LocalPath = "runs/phantom"
    """Run folder; the same command again resumes there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    backend: Literal["local", "ray"] = "local"
    """ray: workers on a Ray cluster mine, one for each of its GPUs (without GPUs: processors); all its nodes see the
    run folder and the data under the same paths (extra ray). Trainings stay in this process."""
    address: str | None = None
    """ray only: address of the cluster, such as auto or ray://HOST:10001; default: start one here."""
    offline: bool = False
    """Forbid every download; a missing file is then an error."""
    baseline: bool = True
    """Also train the supervised baselines for the same number of steps (in rounds, and in one schedule; the better one
    on validation is the baseline), and baseline_models; false: none of them."""
    baseline_models: tuple[str, ...] | None = None
    """Further baselines: unetpp, unet, trained on the same labels, steps and seed, with the encoder of the local model,
    in folders of their own; default: unetpp for sks, else none."""
    retrain: bool = True
    """After the last round, also train a new model once, from the initial weights, on the labels and the last pseudo
    masks with the steps of all rounds; the run keeps the model that is best on validation."""
    adopt_tolerance: float = 0.01
    """A round is adopted if validation Dice, paired by image with the last adopted round, may have fallen by at most
    this: by the lower end of the 80 % interval. With fewer than 20 validation images (groups) only the mean counts, and
    it must not fall at all. A false alarm on a clean image counts 0, silence 1."""
    crossfit: int = 2
    """Parts of the unlabeled images, by group. From round 2 on a part is predicted, prompted and scored by a model that
    was trained on the pseudo masks of the other parts only, as a model confirms the masks that it was trained on. The
    price: each round but the last takes this many further trainings of fit.round_steps. 1: none."""
    verdicts: LocalPath | None = None
    """verdicts.json of an earlier run on the same split, as `kmine audit RUN --verdicts FILE` left it in that run.
    Rejected pseudo masks are not used in training, accepted ones in every round, corrected masks are labels."""
    plan: bool = True
    """Choose what is not given (image size, network, steps, ...) as kmine plan does; false, and for phantom: the
    defaults below. A run keeps the plan that it began with."""
    plan_minutes: float | None = None
    """Time that a planned run may take, or all runs of data.folds together; default: for each run 20 on a CPU, 60 on a
    GPU."""
    log: list[str] = field(default_factory=list)
    """Experiment trackers: tensorboard, wandb, mlflow, several as in --log tensorboard mlflow; each is an extra (pip
    install 'kmine[wandb]'). Without a server (offline, or none named) they write into the run folder. history.csv and
    log.txt are written in any case."""
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
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fixmatch: FixmatchConfig = field(default_factory=FixmatchConfig)
    unimatch: UnimatchConfig = field(default_factory=UnimatchConfig)

    def __post_init__(self) -> None:
        expand_paths(self)
        object.__setattr__(self, "model", self.model.resolved())
        if self.baseline_models is None:
            object.__setattr__(self, "baseline_models", ("unetpp",) if self.model.split()[0].name == "sks" else ())
        unknown = set(self.baseline_models) - {"unetpp", "unet"}
        require(not unknown, "baseline_models", "unetpp, unet", self.baseline_models)
        expected = f"some of {', '.join(TRACKERS)}, each once"
        require(len({*self.log} & {*TRACKERS}) == len(self.log), "log", expected, self.log)
        require(bool(self.out), "out", "a folder", self.out)
        require(self.address is None or self.backend == "ray", "address", "none without --backend ray", self.address)
        has_sks = "sks" in self.model.name.split("+")
        require(not (self.data.patch and has_sks), "data.patch", "null with model.name sks", self.data.patch)
        require(self.rounds >= 0, "rounds", "0 or more", self.rounds)
        require(1 <= self.crossfit <= 10, "crossfit", "1 to 10", self.crossfit)
        require(0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1", self.seed)
        minutes = self.plan_minutes
        require(minutes is None or 0 < minutes < 1e6, "plan_minutes", "a positive number", minutes)
        require(self.adopt_tolerance >= 0, "adopt_tolerance", "0 or more", self.adopt_tolerance)
