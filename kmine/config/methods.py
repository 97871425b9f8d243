"""Settings of the methods that mining is compared with; the loop and its baseline use none of them.

Where a paper has the number, it is the default, with the one exception that is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from kmine.config.checks import fraction, require


@dataclass(frozen=True)
class TeacherConfig:
    """Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780)."""

    weight: float = 1.0
    """Highest weight of the squared difference between the probabilities of model and teacher; 0: the labels alone.
    Ours: the authors' 100, for classes of whole images, did harm here (docs/method.md)."""
    ramp_up: float = 0.25
    """Share of a round's steps in which that weight rises, by exp(-5 (1 - t)^2); about theirs for CIFAR-10."""
    decay: float = 0.99
    """Of the running average that is the teacher, and what is validated and kept, whatever fit.ema_decay. Theirs while
    the weight rises; afterwards, in trainings a hundred times as long as a round, they have .999."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < float("inf"), "teacher.weight", "0 or more", self.weight)
        fraction(self.ramp_up, "teacher.ramp_up", closed_low=True)
        require(0 < self.decay < 1, "teacher.decay", "between 0 and 1", self.decay)


@dataclass(frozen=True)
class FixmatchConfig:
    """FixMatch for segmentation, as in UniMatch (arXiv 2208.09910), with one strong view."""

    weight: float = 1.0
    """Weight of the unlabeled images beside the labeled ones, half of it for each of their two streams, as in UniMatch;
    0: the labels alone."""
    threshold: float = 0.95
    """Pixels teach where the model's highest probability in the weak view is above this, as in both papers; 1: none."""
    cutmix: float = 0.5
    """Probability that a strong view gets a rectangle of another one, as in UniMatch."""
    feature_perturbation: float = 0.5
    """Share of the encoder's channels dropped in the weak view's own stream, as in UniMatch."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < float("inf"), "fixmatch.weight", "0 or more", self.weight)
        for name in ("threshold", "cutmix"):
            fraction(getattr(self, name), f"fixmatch.{name}", closed_low=True)
        require(
            0 <= self.feature_perturbation < 1,
            "fixmatch.feature_perturbation",
            "0 to below 1",
            self.feature_perturbation,
        )
