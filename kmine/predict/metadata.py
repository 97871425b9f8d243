"""Metadata of a model that prediction needs beside the network: plain values, stored in ONNX files too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

import numpy as np

from kmine.data.quality.intensity import out_of_range_text
from kmine.data.resize import Resizer
from kmine.errors import UserError
from kmine.io.json_file import is_kind, json_field, parse_json
from kmine.mining.calibration.local_quality import LocalQualityEstimator, local_quality_summary
from kmine.ops.calibrator import FEATURES
from kmine.store.run_info import is_plain
from kmine.types import Probs

FORMAT = 2
"""Version of the text; raised when an older kmine cannot read it."""
TEXTS = ("name", "dataset", "method", "segmenter", "checkpoint", "signature", "card", "no_estimate")
WHOLE_NUMBERS = {"size": (1, 8192), "batch_size": (1, 4096), "round_idx": (0, 9999)}
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
    """best: the one in use (`fit.checkpoint`); final: the last step's."""
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
    resize: str = "squash"
    """How images become squares: a value of `data.resize`."""
    channels: tuple[tuple[int, str], ...] = ()
    """Number and name of each channel that is a file of its own, in the order of the colours; empty for pictures."""

    @property
    def resizer(self) -> Resizer:
        """From the frame of an image to the square and back."""
        return Resizer(self.size, self.resize == "letterbox")

    def to_json(self) -> str:
        """As JSON text; `from_json` is the inverse. On disk `local_quality` is called `alone`."""
        values = asdict(self)
        values["alone"] = values.pop("local_quality")
        if values["resize"] == "squash":  # an older kmine, which knows no other way, reads the file
            del values["resize"]
        if not values["channels"]:
            del values["channels"]
        return json.dumps({"format": FORMAT, **values}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> ModelMetadata:
        """See `to_json`; `origin` names the file in messages.

        Raises:
            UserError: text of another program, or of a newer version.
        """
        cure = "export the run again"
        try:
            values = parse_json(text, origin, "a file of `kmine predict RUN --export FILE.onnx`", cure)
            if values.pop("format") not in READABLE:
                raise UserError(f"{origin}: written by another version of kmine; export the run again")
            if not isinstance(values["class_names"], list):
                raise UserError(f"{origin}: expected `class_names` to be a list; {cure}")
            values["class_names"] = tuple(values["class_names"])
            values["window"] = tuple(values["window"]) if values["window"] else None
            values["channels"] = tuple((number, name) for number, name in values.get("channels", ()))
            values["local_quality"] = values.pop("alone", None)
            made = cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{origin}: expected a file of `kmine predict RUN --export FILE.onnx`, got one without kmine's "
                "metadata; export the run again"
            ) from error
        made.check(origin, cure)
        return made

    def check(self, origin: str, cure: str) -> None:
        """Raise `UserError` on a field of another type or out of range; `origin` and `cure` are for the message."""
        values = asdict(self)
        for name in TEXTS:
            text = json_field(values, name, str, where=origin, cure=cure)
            if name != "card" and not is_plain(text):
                raise UserError(f"{origin}: expected `{name}` to be one line of printable text; {cure}")
        if self.resize not in ("squash", "letterbox"):
            raise UserError(f"{origin}: expected `resize` to be squash or letterbox; {cure}")
        for name, (low, high) in WHOLE_NUMBERS.items():
            if not low <= json_field(values, name, int, where=origin, cure=cure) <= high:
                raise UserError(f"{origin}: expected `{name}` from {low} to {high}, got {values[name]}; {cure}")
        names, window = self.class_names, self.window
        is_named = all(is_plain(name) and name for name in names)
        if not is_named or not 2 <= len(names) <= 255:
            raise UserError(f"{origin}: expected `class_names` to be 2 to 255 printable names; {cure}")
        numbers = [number for number, name in self.channels if is_kind(number, int) and is_plain(name) and name]
        if not len({n for n in numbers if 0 <= n <= 9999}) == len(self.channels) <= 3:
            raise UserError(f"{origin}: expected `channels` to be up to 3 pairs of number and name; {cure}")
        is_window = window is None or (all(is_kind(end, float) for end in window) and len(window) == 2)
        if not is_window or (window and not window[0] < window[1]):
            raise UserError(f"{origin}: expected `window` to be [LOW, HIGH] with LOW below HIGH; {cure}")
        for name, use in (("intensity", _use_intensity), ("local_quality", _use_local_quality)):
            value = json_field(values, name, dict, NoneType, where=origin, cure=cure)
            try:
                use(value)
            except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                raise UserError(f"{origin}: `{name}` is not what kmine wrote ({problem}); {cure}") from error


def _use_intensity(value: Mapping[str, Any] | None) -> None:
    """Try the ranges on an image, to see any mistake in them."""
    out_of_range_text(value, np.zeros((4, 4, 3), np.uint8))


def _use_local_quality(value: Mapping[str, Any] | None) -> None:
    """Try the estimator on an object, to see any mistake in it."""
    if value is None:
        return
    local_quality_summary(value)
    estimator = LocalQualityEstimator.from_json(value)
    for calibrator in estimator.calibrators.values():
        numbers = [*calibrator.fill, *calibrator.scale, *calibrator.weights, calibrator.intercept, *calibrator.knots]
        if not np.isfinite(np.hstack(numbers).astype(float)).all():
            raise ValueError("a number that is not finite")
        if not np.isfinite(calibrator.estimates(np.zeros((1, len(FEATURES))))).all():
            raise ValueError("an estimate that is not finite")
    half = np.full((2, 8, 8), 0.4, np.float32)
    half[0], half[:, 2:6, 2:6] = 0.6, np.array([0.4, 0.6])[:, None, None]
    for tta in estimator.calibrators:
        estimator.estimates(Probs("", half, None), tta)
