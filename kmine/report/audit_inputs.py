"""What the audit's page is made of: plain values that a caller fills in, no reading of runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kmine.types import Prompts

Kind = Literal["pseudo", "labeled"]
"""Whose mask is looked at: one that was mined, or one that was given."""

LAYERS = ("pseudo", "local", "segmenter", "given", "model", "withheld")
"""The overlays of an image: the pseudo mask that taught, the local model's and the segmenter's mask it came from; the
given mask of a labeled image, and what models say of it that did not learn from it; the withheld mask, where there is
one."""


@dataclass(frozen=True)
class Layer:
    """One mask over an image, in the image's own frame."""

    name: str
    """One of `LAYERS`."""
    class_id: int
    """255: the pixels that are ignored in training."""
    rle: str
    """Compressed COCO run lengths of (height, width)."""


@dataclass(frozen=True)
class AuditItem:
    """One mask that a person may look at, with its whole story."""

    sample_id: str
    kind: Kind
    rank: int
    """1: looks most likely wrong of its kind."""
    suspicion: float
    """[0, 1], what `rank` goes by."""
    explanations: tuple[str, ...]
    """What speaks against it, the weightiest first, in words."""
    picture: str
    """Path of the image as a file that a browser shows, relative to the page."""
    height: int
    width: int
    layers: tuple[Layer, ...]
    prompts: tuple[Prompts, ...] = ()
    """What the segmenter was asked in the last round, in the image's own frame; without hints."""
    facts: Mapping[str, str | int | float | None] = field(default_factory=dict)
    """Columns to show, filter and sort by: group, class, round, reason, estimated Dice, area and the like."""
    history: tuple[str, ...] = ()
    """One line a round: asked, answered, judged, taught or not, what changed, by which model and weights."""
    mask_signature: str = ""
    """Of the mask as it stands: a verdict on it says which mask it was on."""
