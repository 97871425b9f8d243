"""Prediction with the local model of a run, or with its ONNX export."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kmine import cli
from kmine.api.arrays import rgb_image
from kmine.data.quality.intensity import out_of_range_text
from kmine.data.resize import to_frame
from kmine.errors import unknown_name
from kmine.io.errors import expanded
from kmine.predict.estimates import estimate_objects, load_estimator
from kmine.predict.files import PredictConfig, predict_files
from kmine.predict.inputs import find_inputs
from kmine.predict.metadata import ModelMetadata
from kmine.predict.network import Network, TorchNetwork, open_onnx
from kmine.predict.outputs import Prediction, class_mask, mean_max_probability, prediction_columns
from kmine.predict.run_model import load_model, open_run_model

TTA = Literal["none", "hflip", "flips"]


class Predictor:
    """Predicts masks with a trained local model; no segmenter is needed. Use `from_run` or `from_onnx`."""

    def __init__(self, path: Path, metadata: ModelMetadata, network: Network) -> None:
        self.path, self.metadata, self._network = path, metadata, network

    @classmethod
    def from_run(
        cls,
        run: str | PathLike[str],
        *,
        round: int | None = None,
        checkpoint: Literal["best", "final"] = "best",
        device: str = "auto",
    ) -> Predictor:
        """Open the model of a run folder.

        Args:
            run: the run folder, or a `kmine.Run`.
            round: round of the model; None is the kept one.
            checkpoint: "best" is the one in use (`fit.checkpoint`), "final" is that of the last step.
            device: auto, cpu, cuda or cuda:N.

        Raises:
            UserError: no run folder, an unfinished run, no such round, damaged weights.
        """
        path = expanded(run)
        run_model = open_run_model(path, round, checkpoint)
        return cls(path, run_model.metadata, TorchNetwork(lambda: load_model(run_model), device))

    @classmethod
    def from_onnx(cls, path: str | Path, *, device: str = "auto") -> Predictor:
        """Open a model that `kmine predict RUN --export FILE.onnx` wrote; torch is not loaded.

        Raises:
            UserError: a missing or damaged file, or an ONNX file without kmine's metadata.
        """
        return cls(expanded(path), *open_onnx(expanded(path), device))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id; 0 is the background."""
        return self.metadata.class_names

    def predict(self, image: NDArray[np.uint8], *, tta: TTA = "none") -> Prediction:
        """Predict one image.

        Args:
            image: (H, W, 3) RGB or (H, W) grey, uint8, [0, 255].
            tta: test-time augmentation: mean with the mirror image ("hflip") or with all flips ("flips").

        Returns:
            `mask` (H, W) uint8 class ids, `probs` (K, H, W) float32 that sum to 1 over K, `objects`,
            `estimated_dice` and `warning`, all in the frame of the image.

        Raises:
            UserError: an image of another shape or type, an unknown `tta`.
        """
        _refuse_unknown(tta)
        rgb = rgb_image(image, "image")
        height, width = rgb.shape[:2]
        resizer = self.metadata.resizer
        resized = resizer.image(rgb)
        predicted = self._network.predict(resized[None], tta).content(resizer, (height, width))
        probs, std = next(predicted.per_image())
        mask = class_mask(probs, height, width)
        estimator, _ = load_estimator(self.metadata, tta)
        objects = estimate_objects(estimator, tta, probs, std, mask)
        pairs = None if objects is None else [(0, obj) for obj in objects]
        warning = out_of_range_text(self.metadata.intensity, resized)
        return Prediction(mask, mean_max_probability(probs), warning, pairs, to_frame(probs, height, width))

    def predict_files(
        self,
        inputs: Sequence[str | Path],
        out: str | Path,
        *,
        tta: TTA = "none",
        probs: bool = False,
        overlay: bool = False,
        window: tuple[float, float] | None = None,
    ) -> pd.DataFrame:
        """Predict images, volumes, DICOM series and folders of these, as `kmine predict` does, and resume as it does.

        Args:
            inputs: PNG, JPEG, TIFF, DICOM and NIfTI files, and folders.
            out: folder for masks/, predictions.csv, objects.csv and classes.json.
            tta: as for `predict`.
            probs: also write the probabilities.
            overlay: also draw the masks over the images.
            window: stored values shown as black and as white; None is that of the run.

        Returns:
            predictions.csv, a row an input; the column `error` is empty for predicted ones.

        Raises:
            UserError: no readable input, an unknown `tta`, or an output folder that cannot be used.
        """
        _refuse_unknown(tta)
        words = [str(path) for path in inputs]
        cfg = PredictConfig([str(self.path), *words], str(out), tta=tta, probs=probs, overlay=overlay, window=window)
        found = find_inputs(words, expanded(out))
        predicted = predict_files(cfg, self.metadata, self._network, found, cli.Terminal(quiet=True))
        return pd.DataFrame(predicted.rows).reindex(columns=prediction_columns(self.class_names))


def _refuse_unknown(tta: str) -> None:
    if tta not in get_args(TTA):
        raise unknown_name("tta", str(tta), get_args(TTA))
