"""Settings of a sweep: those of the loop, and the lists of values to vary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from kmine.config import DATA_SETTINGS, LoopConfig
from kmine.config.checks import LocalPath, fraction, require
from kmine.errors import UserError, unknown_name
from kmine.io.plugins import Registry

MINING, ORACLE = "mining", "oracle"
METHODS: Registry[str | Callable[..., Any]] = Registry(
    "methods",
    "kmine.methods",
    {n: f"kmine.methods.{n}:{n}" for n in ("supervised", "self_training", "mean_teacher", "fixmatch", "unimatch")}
    | {
        "supervised_once": "kmine.methods.supervised:supervised_once",
        MINING: "kmine.methods.mining:prepare_and_mine",
        ORACLE: "kmine.methods.oracle:oracle",
    },
)
"""Methods that a sweep can compare. kmine's own are MODULE:FUNCTION, imported by `kmine.methods.registry`."""
LABELS_ONLY = ("supervised", "supervised_once")
"""Those that need no unlabeled images."""
VARIED = ("out", "seed", "rounds", "baseline", "model.name", "fit.steps", "fit.round_steps")
"""Settings that `--set` may not change, beside all of data: those varied, and the budget, which is equal for all."""

SWEEP_SETTINGS = (
    *("out", "fractions", "seeds", "methods", "models", "set", "processes", "device", "dry_run", "plan_minutes"),
    *(name for name in DATA_SETTINGS if name != "data.window"),
    "segmenter.name",
)
"""Those of the short help of `kmine sweep`."""


@dataclass(frozen=True)
class SweepConfig(LoopConfig):
    """Settings of `python -m kmine.sweep`.

    The varied lists replace the loop's `seed`, `model.name`, `data.label_fraction` and `baseline`.
    """

    out: LocalPath = "runs/sweep"
    """Folder of the sweep; the same command again resumes there, and the same command started twice shares the work."""
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])
    """Shares of the training images whose masks are used; nested: each set is part of the next. With data.fine_groups,
    shares of the training groups (volumes)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; each draws its own labeled images. Test and validation split are the same for all."""
    methods: list[str] = field(default_factory=lambda: ["supervised", "mining"])
    """Methods: supervised, supervised_once (the same steps in one schedule), self_training, mean_teacher, fixmatch,
    unimatch, mining, oracle (true masks: the upper bound)."""
    models: list[str] = field(default_factory=list)
    """Local models, as in unetpp unet sks; default: model.name."""
    set: list[str] = field(default_factory=list)
    """Settings of a single method or model: supervised.fit.lr=0.0003 sks.model.encoder=mobilenetv2_100."""
    processes: int | Literal["auto"] = 1
    """1: this process; more: worker processes, each with its share of the threads and, with several GPUs and no GPU
    named by device, one of them (CUDA_VISIBLE_DEVICES). A crash then costs one trial. auto: one per GPU, as several
    on one GPU slow each other; without GPU one per two cores, of 4 GB of free memory each."""
    backend: Literal["local", "ray"] = "local"
    """ray: spread trials over a Ray cluster whose nodes all see the folder out and the data (extra ray)."""
    dry_run: bool = False
    """Print the plan and train nothing."""

    def __post_init__(self) -> None:
        model = self.model
        super().__post_init__()
        # Each model of the sweep has its own default encoder, so none is filled in here.
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "models", self.models or [model.name])
        for name in ("fractions", "seeds", "methods", "models"):
            values = getattr(self, name)
            require(0 < len(values) == len({*values}), name, "one or more, each once", values)
        for value in self.fractions:
            fraction(value, "fractions")
        for seed in self.seeds:
            require(0 <= seed < 2**31, "seeds", "0 to 2**31 - 1", seed)
        for method in self.methods:
            if method not in METHODS.names():
                raise unknown_name("methods", method, METHODS.names())
        require(self.data.num_runs == 1, "data.folds", "null in a sweep, as kmine loop makes folds", self.data.folds)
        require(self.processes == "auto" or self.processes >= 1, "processes", "auto or at least 1", self.processes)
        self.own_settings()

    def own_settings(self) -> dict[str, dict[str, str]]:
        """`set` as method or model -> setting -> value as text.

        Raises:
            UserError: not NAME.SETTING=VALUE, a name not in the sweep, or a setting that all trials share.
        """
        settings: dict[str, dict[str, str]] = {}
        for assignment in self.set:
            key, equals, value = assignment.partition("=")
            name, _, setting = key.partition(".")
            expected = "NAME.SETTING=VALUE, as in mining.gate.target_dice=0.9"
            require(bool(equals and setting), "set", expected, assignment)
            if name not in (*METHODS.names(), *self.models):
                raise unknown_name("set", name, (*METHODS.names(), *self.models))
            if setting in VARIED or setting.startswith("data."):
                raise UserError(
                    f"set: {setting} cannot differ for {name}: data, budget and varied settings are the same for all "
                    "trials; give it as a setting of the sweep"
                )
            settings.setdefault(name, {})[setting] = value
        return settings
