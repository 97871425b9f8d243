"""The model card: model, training data, measured quality, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kmine.report.html import environment
from kmine.report.table import percent

STAND_INS = {
    "tiny": "kmine's own small segmenter, trained on procedural pictures only; not SAM",
    "ellipse": "the ellipse inscribed in the box, a stand-in that ignores the image",
    "none": "nothing was mined",
}
"""Notes on segmenters that are not large promptable models."""


@dataclass(frozen=True)
class Figures:
    """Metrics of one split: means over images, 95 % interval of Dice over groups (NaN if unknown)."""

    split: str
    num_images: int
    dice: float
    low: float
    high: float
    iou: float
    hd95: float
    num_missed: int
    num_empty: int = 0
    """Images without Dice: truth and prediction empty."""
    dice_lesion: float = float("nan")
    """Mean Dice where there is a lesion."""
    num_clean: int = 0
    """Clean images; of several classes, the sum over them."""
    false_alarm_rate: float = float("nan")
    """Share of `num_clean` with a prediction."""


@dataclass(frozen=True)
class Card:
    """Content of the card."""

    name: str
    dataset: str
    class_names: Sequence[str]
    counts: Sequence[tuple[str, int]]
    """(split, number of images)."""
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
    """Guarantee of the calibration for the pseudo masks used in training, one sentence."""
    signatures: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    estimates: str = "Unknown"
    """Basis of the estimated Dice of its masks, or why there is none, one sentence."""

    @property
    def has_clean(self) -> bool:
        """Whether an image may be clean."""
        return any(row.num_clean or row.num_empty for row in self.figures)

    @property
    def segmenter_note(self) -> str:
        """Note on a stand-in segmenter; empty for a large model."""
        return STAND_INS.get(self.segmenter.removesuffix("+adapted"), "")


def render_card(card: Card) -> str:
    """Render the card as Markdown; names are escaped, so they cannot end a line or a table cell."""
    env = environment().overlay(autoescape=False)
    env.filters |= {"plain": _plain, "percent": percent}
    return env.get_template("card.jinja").render(card=card, is_known=lambda value: value == value)


def _plain(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
