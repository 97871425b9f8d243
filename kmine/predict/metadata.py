"""What predicting takes to know of a model beside its network: plain values, which an ONNX file carries with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError

FORMAT = 2
"""Raised when an older kmine could not read it any more."""
READABLE = (1, 2)
"""1: without what estimates Dice."""


@dataclass(frozen=True)
class ModelMetadata:
    """A model as it was trained."""

    name: str
    """Of the run."""
    dataset: str
    class_names: tuple[str, ...]
    """By class id; 0 is background."""
    size: int
    """S, side of the square that the network sees."""
    window: tuple[float, float] | None
    """Stored values shown as black and as white."""
    batch_size: int
    method: str
    segmenter: str
    """Whose masks it learnt from, by its own name; a stand-in keeps its own."""
    round_idx: int
    checkpoint: str
    """best: chosen on validation; final: the last step's."""
    signature: str
    """Of weights and of all that decides what is predicted."""
    intensity: Mapping[str, Any] | None
    """How bright the training images were; None where the run is older than that."""
    card: str = ""
    """The model card, Markdown."""
    alone: Mapping[str, Any] | None = None
    """What estimates the Dice of its masks, as calibration.json has it; None where nothing does."""
    no_estimate: str = ""
    """Why nothing does."""

    def to_json(self) -> str:
        """As one text; `from_json` is the inverse."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> ModelMetadata:
        """See `to_json`. Raises `UserError` for what no kmine wrote, or a newer one; `origin` names the file."""
        try:
            values = json.loads(text)
            if values.pop("format") not in READABLE:
                raise UserError(f"{origin}: written by another version of kmine; export the run again")
            values["class_names"] = tuple(values["class_names"])
            values["window"] = tuple(values["window"]) if values["window"] else None
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{origin}: expected what `kmine predict RUN --export FILE.onnx` writes, got an ONNX file without "
                "kmine's own notes; export the run again"
            ) from error


def colours(num_classes: int) -> NDArray[np.uint8]:
    """(K, 3) RGB, one a class, as far apart in hue as they can be; the background is black."""
    hues = np.linspace(0, 180, max(2, num_classes), endpoint=False)[: num_classes - 1]
    hsv = np.array([[[hue, 230, 255] for hue in hues]], np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]])
