"""Settings of a sweep: those of the loop, and what is varied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kmine.config import LoopConfig
from kmine.config.checks import fraction, require
from kmine.errors import UserError, unknown_name

MINING, ORACLE = "mining", "oracle"
METHODS = ("supervised", "self_training", "mean_teacher", "fixmatch", MINING, ORACLE)
"""What a sweep can compare; `kmine.methods.registry` has them."""
VARIED = ("out", "seed", "rounds", "baseline", "model.name", "fit.steps", "fit.round_steps")
"""What `--set` may not touch, beside all of the data: what is varied, and the budget that is equal for all."""


@dataclass(frozen=True)
class SweepConfig(LoopConfig):
    """Everything `python -m kmine.sweep` can be told.

    Of the loop's settings `seed`, `model.name`, `data.label_fraction` and `baseline` give way to what is varied.
    """

    out: str = "runs/sweep"
    """Folder of the sweep; the same command again resumes there, and the same command started twice shares the work."""
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])
    """Shares of the training images whose masks are used, each among those of the next.

    Where data.fine_groups is given, shares of the training groups (volumes)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each draws its own labeled images; the test and validation split are the same for all."""
    methods: list[str] = field(default_factory=lambda: ["supervised", "mining"])
    """Of supervised, self_training, mean_teacher, fixmatch, mining and oracle (true masks: the ceiling)."""
    models: list[str] = field(default_factory=list)
    """Local models, as in unetpp unet sks; default: model.name."""
    set: list[str] = field(default_factory=list)
    """Settings of one method or one model alone: supervised.fit.lr=0.0003 sks.model.encoder=mobilenetv2_100."""
    processes: int = 1
    """1: in this process; more: so many workers, each with its share of the threads and, where there
    are several GPUs and device names none, one of those (CUDA_VISIBLE_DEVICES). A crash then costs one cell."""
    backend: Literal["local", "ray"] = "local"
    """ray: cells are spread over a Ray cluster whose nodes all see the folder `out` and the data (extra `ray`)."""
    address: str | None = None
    """ray only: address of the cluster, as in auto or ray://HOST:10001; default: one is started here."""
    dry_run: bool = False
    """Print the plan and train nothing."""

    def __post_init__(self) -> None:
        model = self.model
        super().__post_init__()
        # Each model of the sweep has its own default encoder: none is filled in before it is known which one is meant.
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
            if method not in METHODS:
                raise unknown_name("methods", method, METHODS)
        require(self.processes >= 1, "processes", "at least 1", self.processes)
        require(self.address is None or self.backend == "ray", "address", "it with --backend ray alone", self.address)
        self.own_settings()

    def own_settings(self) -> dict[str, dict[str, str]]:
        """What `set` says: method or model -> setting -> value as text.

        Raises:
            UserError: for what is no NAME.SETTING=VALUE, a name that does not take part, or a setting that all share.
        """
        settings: dict[str, dict[str, str]] = {}
        for assignment in self.set:
            key, equals, value = assignment.partition("=")
            name, _, setting = key.partition(".")
            if not (equals and setting):
                raise UserError(
                    f"set: expected NAME.SETTING=VALUE, as in mining.gate.target_dice=0.9, got {assignment!r}"
                )
            if name not in (*METHODS, *self.models):
                raise unknown_name("set", name, (*METHODS, *self.models))
            if setting in VARIED or setting.startswith("data."):
                raise UserError(
                    f"set: {setting} cannot be {name}'s own: data, budget and what is varied are the same for all that "
                    "is compared; give it as a setting of the sweep"
                )
            settings.setdefault(name, {})[setting] = value
        return settings
