"""Settings of the methods that mining is compared with; the loop and its baseline use none of them.

Defaults are the papers' numbers, with one exception, which is named."""

from __future__ import annotations

from dataclasses import dataclass

from kmine.config.checks import fraction, require


@dataclass(frozen=True)
class TeacherConfig:
    """Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780)."""

    weight: float = 1.0
    """Maximal weight of the squared difference between the probabilities of model and teacher; 0: labels only.
    Ours: the authors' 100, for image classification, lowered Dice here (docs/method.md)."""
    ramp_up: float = 0.25
    """Share of a round's steps in which the weight rises, by exp(-5 (1 - t)^2); about the paper's for CIFAR-10."""
    decay: float = 0.99
    """Decay of the moving average that is the teacher and is validated and kept, in place of fit.ema_decay. The paper's
    during ramp-up; afterwards, in trainings a hundred times as long as a round, it uses 0.999."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < float("inf"), "teacher.weight", "0 or more", self.weight)
        fraction(self.ramp_up, "teacher.ramp_up", closed_low=True)
        require(0 < self.decay < 1, "teacher.decay", "between 0 and 1", self.decay)


@dataclass(frozen=True)
class FixmatchConfig:
    """FixMatch for segmentation, as in UniMatch (arXiv 2208.09910), with one strong view."""

    weight: float = 1.0
    """Weight of the unlabeled loss, half of it for each of its two streams, as in UniMatch; 0: labels only."""
    threshold: float = 0.95
    """Pixels count where the highest probability in the weak view is above this, as in both papers; 1: none."""
    cutmix: float = 0.5
    """Probability of CutMix between strong views, as in UniMatch."""
    feature_perturbation: float = 0.5
    """Share of encoder channels dropped in the feature-perturbation stream, as in UniMatch."""

    def __post_init__(self) -> None:
        _check_views("fixmatch", self)


@dataclass(frozen=True)
class UnimatchConfig:
    """UniMatch (arXiv 2208.09910): two strong views, and targets of the average of the model's weights."""

    weight: float = 1.0
    """Weight of the unlabeled loss: a quarter of it for each strong view, half for the perturbed features, as in the
    paper; 0: labels only."""
    threshold: float = 0.95
    """Pixels count where the teacher's highest probability in the weak view is above this, as in the paper; 1: none."""
    cutmix: float = 0.5
    """Probability of CutMix between strong views, drawn for each of the two, as in the paper."""
    feature_perturbation: float = 0.5
    """Share of encoder channels dropped in the feature-perturbation stream, as in the paper."""
    decay: float = 0.99
    """Decay of the moving average that is the teacher and is validated and kept, in place of fit.ema_decay. Ours, for
    short rounds; the paper's model is its own teacher."""

    def __post_init__(self) -> None:
        _check_views("unimatch", self)
        require(0 < self.decay < 1, "unimatch.decay", "between 0 and 1", self.decay)


def _check_views(section: str, cfg: FixmatchConfig | UnimatchConfig) -> None:
    """Raise `UserError` for a setting of both that is out of range."""
    require(0 <= cfg.weight < float("inf"), f"{section}.weight", "0 or more", cfg.weight)
    for name in ("threshold", "cutmix"):
        fraction(getattr(cfg, name), f"{section}.{name}", closed_low=True)
    share = cfg.feature_perturbation
    require(0 <= share < 1, f"{section}.feature_perturbation", "0 to below 1", share)
