"""Metadata of a model that prediction needs beside the network: plain values, stored in ONNX files too."""

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
"""Version of the text; raised when an older kmine cannot read it."""
READABLE = (1, 2)
"""Versions that this kmine reads; 1 has no estimator of Dice."""


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of a trained model."""

    name: str
    """Name of the run folder."""
    dataset: str
    class_names: tuple[str, ...]
    """By class id; 0 is background."""
    size: int
    """S, side of the network's square input."""
    window: tuple[float, float] | None
    """Stored values shown as black and as white."""
    batch_size: int
    method: str
    segmenter: str
    """Name of the segmenter that made its pseudo masks."""
    round_idx: int
    checkpoint: str
    """best: chosen on validation; final: the last step's."""
    signature: str
    """Signature of the weights and of everything that affects predictions."""
    intensity: Mapping[str, Any] | None
    """Brightness of the training images; None for older runs."""
    card: str = ""
    """The model card, Markdown."""
    local_quality: Mapping[str, Any] | None = None
    """Estimator of the Dice of its masks, `alone` in calibration.json; None without one."""
    no_estimate: str = ""
    """Why there is none."""

    def to_json(self) -> str:
        """As JSON text; `from_json` is the inverse. On disk `local_quality` is called `alone`."""
        values = asdict(self)
        values["alone"] = values.pop("local_quality")
        return json.dumps({"format": FORMAT, **values}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> ModelMetadata:
        """See `to_json`; `origin` names the file in messages.

        Raises:
            UserError: text of another program, or of a newer version.
        """
        try:
            values = json.loads(text)
            if values.pop("format") not in READABLE:
                raise UserError(f"{origin}: written by another version of kmine; export the run again")
            values["class_names"] = tuple(values["class_names"])
            values["window"] = tuple(values["window"]) if values["window"] else None
            values["local_quality"] = values.pop("alone", None)
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{origin}: expected a file of `kmine predict RUN --export FILE.onnx`, got one without kmine's "
                "metadata; export the run again"
            ) from error


def colours(num_classes: int) -> NDArray[np.uint8]:
    """(K, 3) RGB, one colour per class at equal distances in hue; the background is black."""
    hues = np.linspace(0, 180, num_classes, endpoint=False)[:-1]
    hsv = np.array([[[hue, 230, 255] for hue in hues]], np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]])
