"""The model card: what a model is, what it was trained on, how good it was found to be, and what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kmine.report.html import environment

STAND_INS = {
    "tiny": "kmine's own small segmenter, trained on procedural pictures alone; not SAM",
    "ellipse": "the ellipse inscribed in the box: no knowledge at all, a stand-in for a segmenter",
    "none": "nothing was mined",
}
"""What must be said of a segmenter that is none of the large models."""


@dataclass(frozen=True)
class Figures:
    """Metrics on one split: means over images, with a 95 % interval of Dice over groups (NaN where there is none)."""

    split: str
    num_images: int
    dice: float
    low: float
    high: float
    iou: float
    hd95: float
    num_missed: int


@dataclass(frozen=True)
class Card:
    """All that the card says."""

    name: str
    dataset: str
    class_names: Sequence[str]
    counts: Sequence[tuple[str, int]]
    """Split -> images."""
    split_rule: str
    size: int
    window: tuple[float, float] | None
    method: str
    model: str
    """The local model with its encoder, in words."""
    segmenter: str
    round_idx: int
    checkpoint: str
    seed: int
    figures: Sequence[Figures]
    guarantee: str
    """What calibration said of the masks it learnt from, one sentence."""
    signatures: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    estimates: str = "Nothing is known of that"
    """What the estimated Dice of its masks rests on, or why there is none, one sentence."""

    @property
    def segmenter_note(self) -> str:
        """What must be said of a stand-in; empty for a large model."""
        return STAND_INS.get(self.segmenter.removesuffix("+adapted"), "")


def render_card(card: Card) -> str:
    """The card as Markdown; a name from outside cannot end a line or a table's cell."""
    env = environment().overlay(autoescape=False)
    env.filters["plain"] = _plain
    return env.get_template("card.jinja").render(card=card, is_known=lambda value: value == value)


def _plain(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
