"""Prediction of files into a folder of masks and tables; a repeated call resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from kmine.config.checks import LocalPath, expand_paths, require
from kmine.data.io.dicom_seg import require_highdicom
from kmine.data.io.find_files import printable
from kmine.errors import UserError, first_names
from kmine.io.files import class_colours, sign, write_atomic
from kmine.mining.calibration.local_quality import local_quality_summary
from kmine.predict.estimates import OBJECT_COLUMNS, load_estimator
from kmine.predict.inputs import Inputs
from kmine.predict.log import OBJECTS, TABLE, OutputLog, Row
from kmine.predict.metadata import ModelMetadata
from kmine.predict.network import Network
from kmine.predict.outputs import prediction_columns
from kmine.predict.reader import file_stamps
from kmine.predict.stream import PredictJob, predict_stream
from kmine.setup.device import require_device_name
from kmine.types import ProgressReporter

VERSION = 4
"""Version of the outputs: raised when the same model and image yield other ones."""


@dataclass(frozen=True)
class PredictConfig:
    """Settings of `python -m kmine.predict`."""

    run_inputs: list[LocalPath] = field(default_factory=list)
    """The run folder, or a model exported as FILE.onnx; then images, volumes and folders."""
    out: LocalPath = "predictions"
    """Folder for masks/, predictions.csv, objects.csv, classes.json and, with their flags, probs/ and overlays/."""
    round: int | None = None
    """Round of the run; default: the one that the run keeps."""
    checkpoint: Literal["best", "final"] = "best"
    """best: the one in use (fit.checkpoint); final: of the round's last step."""
    tta: Literal["none", "hflip", "flips"] = "none"
    """Average over the mirror image (hflip), or all four flips (flips): slower by 2 and 4. Dice is estimated only
    with none and with the run's infer.tta."""
    probs: bool = False
    """Also write probabilities of all classes: (K, H, W) float16 as .npz, of volumes (X, Y, Z, K) float32 as .nii."""
    overlay: bool = False
    """Also draw each mask over its image, as JPEG; of a volume the slice with the largest mask."""
    dicom_seg: bool = False
    """Also write the masks of DICOM images, series and frames as DICOM segmentations, segs/NAME.dcm (extra dicom); like
    their images these hold the patient's data."""
    window: tuple[float, float] | None = None
    """Stored values shown as black and as white, as in [-160, 240]; default: those of the run's data.window."""
    batch_size: int | None = None
    """Images (slices) per forward pass; default: the run's infer.batch_size."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    export: LocalPath | None = None
    """Also write the model to this file, FILE.onnx, which predicts without PyTorch; its model card lies beside it."""
    card: bool = False
    """Also write the model card, model_card.md, into the folder of outputs."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.round is None or self.round >= 0, "round", "0 or more", self.round)
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        low, high = self.window or (0, 1)
        require(low < high, "window", "two rising numbers", [low, high])
        is_onnx = self.export is None or Path(self.export).suffix.lower() == ".onnx"
        require(is_onnx, "export", "a name that ends in .onnx", self.export)
        require_device_name(self.device)


class PredictedFiles(NamedTuple):
    """Outcome of `predict_files`."""

    rows: list[Row]
    """Rows of predictions.csv, unreadable files included."""
    errors: list[str]
    """One line for each unreadable file."""


def predict_files(
    cfg: PredictConfig, metadata: ModelMetadata, network: Network, inputs: Inputs, progress: ProgressReporter
) -> PredictedFiles:
    """Write masks, predictions.csv, objects.csv and classes.json into `cfg.out`; skip finished inputs.

    Raises:
        UserError: none of the inputs is readable, or `cfg.out` cannot be written or holds other files.
    """
    out = Path(cfg.out)
    window = cfg.window or metadata.window
    estimator, no_estimate_reason = load_estimator(metadata, cfg.tta)
    batch_size = cfg.batch_size or metadata.batch_size
    job = PredictJob(network, metadata, out, window, cfg.tta, batch_size, cfg.probs, cfg.overlay, estimator)
    job = replace(job, dicom_seg=cfg.dicom_seg)
    estimator_json = estimator.to_json() if estimator else None
    settings: list[object] = [metadata.signature, window, cfg.tta, cfg.probs, cfg.overlay, estimator_json]
    if cfg.dicom_seg:
        require_highdicom()
        settings.append("dicom_seg")
    signatures = {item.name: sign(VERSION, *settings, file_stamps(item)) for item in inputs.readable}
    with closing(OutputLog(out)) as output_log:
        output_log.claim(name for item in inputs.readable for name in job.names(item).values())
        done = {name: output_log.done(name, signature) for name, signature in signatures.items()}
        rows = {name: row for name, row in done.items() if row}
        progress.log(
            f"{len(inputs.readable)} images and volumes, {len(rows)} of them done before; model {metadata.name}, round "
            f"{metadata.round_idx}, trained with segmenter {metadata.segmenter}"
        )
        if metadata.intensity is None:
            progress.log("the run does not hold the brightness of its training images: no warning of unlike images")
        if no_estimate_reason:
            progress.log(f"no estimated_dice: {no_estimate_reason}")
        errors = [f"{skipped.path}: {skipped.problem}" for skipped in inputs.unreadable]
        errors += _predict_pending(job, inputs, output_log, signatures, rows, progress)
        table = [rows[item.name] for item in inputs.readable]
        table += [{"file": skipped.path, "error": skipped.problem} for skipped in inputs.unreadable]
        output_log.write_table(prediction_columns(metadata.class_names), table)
        if estimator:
            objects = ({"file": row["file"], **object_row} for row in table for object_row in row.get("objects", ()))
            output_log.write_table(OBJECT_COLUMNS, objects, OBJECTS)
        _write_classes(out, metadata, no_estimate_reason)
    if len(errors) == len(table):
        raise UserError(f"none of {len(table)} images could be read, the first: {errors[0]}")
    return PredictedFiles(table, errors)


def _predict_pending(
    job: PredictJob,
    inputs: Inputs,
    output_log: OutputLog,
    signatures: Mapping[str, str],
    rows: dict[str, Row],
    progress: ProgressReporter,
) -> list[str]:
    """Predict the inputs without a row and add theirs to `rows`; returns the errors of unreadable ones."""
    pending = [item for item in inputs.readable if item.name not in rows]
    errors: list[str] = []
    progress.start("predicting", len(pending))
    for count, result in enumerate(predict_stream(job, pending), 1):
        name = result.item.name
        rows[name] = row = {**result.row, "file": printable(result.row["file"])}
        if result.error:
            errors.append(result.error)
        else:
            output_log.add(name, signatures[name], result.names.values(), row)
        progress.advance(count, f"{len(errors)} unreadable" if errors else "")
    return errors


def _write_classes(out: Path, metadata: ModelMetadata, no_estimate_reason: str) -> None:
    """Write classes.json: mask values, overlay colours, and the basis of estimated_dice."""
    of_each = zip(metadata.class_names, class_colours(len(metadata.class_names)).tolist(), strict=True)
    classes = [{"id": n, "name": name, "overlay_rgb": colour} for n, (name, colour) in enumerate(of_each)]
    values = {"classes": classes, "model": metadata.name, "round": metadata.round_idx, "signature": metadata.signature}
    values["estimated_dice"] = no_estimate_reason or local_quality_summary(metadata.local_quality or {})
    write_atomic(out / "classes.json", json.dumps(values, indent=1).encode())


def files_summary(predicted: PredictedFiles, inputs: Inputs, out: Path) -> list[str]:
    """Lines for the terminal: numbers of predicted and unreadable inputs and of warnings."""
    rows, errors = predicted
    num_warned = sum(bool(row.get("warning")) for row in rows)
    text = f"{len(rows) - len(errors)} predicted, {len(errors)} unreadable, {num_warned} with a warning; {out / TABLE}"
    others = f"; {inputs.num_others} files of other kinds skipped" if inputs.num_others else ""
    return [text + others, *([f"unreadable: {first_names(errors, separator='; ')}"] if errors else [])]
