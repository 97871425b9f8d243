"""`python -m kmine.predict RUN INPUT...`: masks of new images, by the local model that a run came to."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kmine import cli
from kmine.data.io.find_files import printable
from kmine.errors import UserError
from kmine.io.files import sign, write_atomic
from kmine.mining.calibration.local_quality import local_quality_summary
from kmine.predict.estimates import OBJECT_COLUMNS, load_estimator
from kmine.predict.inputs import Inputs, find_inputs
from kmine.predict.log import (
    OBJECTS,
    TABLE,
    OutputLog,
    Row,
)
from kmine.predict.metadata import ModelMetadata, colours
from kmine.predict.network import TorchNetwork, open_onnx
from kmine.predict.outputs import prediction_columns
from kmine.predict.reader import file_stamps
from kmine.predict.run_model import RunModel, load_model, open_run_model
from kmine.predict.stream import PredictJob, PredictResult, predict_stream

if TYPE_CHECKING:
    from kmine.predict.network import Network

DESCRIPTION = """Predict masks of new images with the local model of a run (its adopted round, the checkpoint chosen on
validation), or with a model that was exported. RUN_INPUTS: first the run folder or FILE.onnx, then images (PNG, JPEG,
TIFF, DICOM), volumes (NIfTI), DICOM series (their folders), and folders of all these. The same command goes on where it
stopped. Exit code 1: some could not be read. Not a medical device."""

VERSION = 3
"""Of what is written: raised when the same model and image give another output."""
CARD = "model_card.md"
MAX_NAMED = 5


@dataclass(frozen=True)
class PredictConfig:
    """Everything `python -m kmine.predict` can be told."""

    run_inputs: list[str] = field(default_factory=list)
    """The run folder, or a model exported as FILE.onnx; then images, volumes and folders."""
    out: str = "predictions"
    """Folder for masks/, predictions.csv, objects.csv, classes.json and, where asked for, probs/ and overlays/."""
    round: int | None = None
    """Which round of the run; default: the one it adopted last."""
    checkpoint: Literal["best", "final"] = "best"
    """best: chosen on validation; final: of the round's last step."""
    tta: Literal["none", "hflip", "flips"] = "none"
    """Average over the mirror image (hflip), or all four flips (flips): slower by 2 and 4. Dice is estimated
    with none and with the run's infer.tta alone."""
    probs: bool = False
    """Also write probabilities of all classes: (K, H, W) float16 as .npz, of volumes (X, Y, Z, K) float32 as .nii."""
    overlay: bool = False
    """Also draw each mask over its image, as JPEG; of a volume the slice that shows most of it."""
    window: tuple[float, float] | None = None
    """Stored values shown as black and as white, as in [-160, 240]; default: those of the run's data.window."""
    batch_size: int | None = None
    """Images (slices) per forward pass; default: the run's infer.batch_size."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    export: str | None = None
    """Also write the model as this file, FILE.onnx, with all it takes to predict from it without PyTorch."""
    card: bool = False
    """Also write the model card, model_card.md, into the folder of outputs; beside an export there always is one."""

    def __post_init__(self) -> None:
        if self.round is not None and self.round < 0:
            raise UserError(f"round: expected 0 or more, got {self.round}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise UserError(f"window: expected two rising numbers, got {list(self.window)}")
        if self.export is not None and Path(self.export).suffix.lower() != ".onnx":
            raise UserError(f"export: expected a name that ends in .onnx, got {self.export!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine predict", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(PredictConfig, words, prog=prog, description=DESCRIPTION, positional="run_inputs")
    return cli.guarded(prog, lambda: run_predict(cfg))


def run_predict(cfg: PredictConfig) -> int:
    """Open the model, then do what is asked: export, card, masks."""
    terminal = cli.Terminal()
    first, *words = cfg.run_inputs
    path = Path(first).expanduser()
    if not words and not (cfg.export or cfg.card):
        raise UserError(
            f"{first}: expected images after it, got none; name files or folders, or pass --export FILE.onnx"
        )
    is_exported = path.suffix.lower() == ".onnx" and not path.is_dir()
    if is_exported and (cfg.export or cfg.round is not None or cfg.checkpoint != "best"):
        raise UserError(f"{first}: --export, --round and --checkpoint want a run folder, got an exported model")
    # What can be refused without the network comes before it is loaded.
    run_model = None if is_exported else open_run_model(path, cfg.round, cfg.checkpoint)
    inputs = find_inputs(words, Path(cfg.out))
    if words and not inputs.readable and not inputs.unreadable:
        raise UserError(f"expected images, found none among {', '.join(words)}; name other files or folders")
    metadata, network = open_onnx(path, cfg.device) if run_model is None else _network_of_run(run_model, cfg, terminal)
    if cfg.card:
        write_atomic(Path(cfg.out) / CARD, metadata.card.encode())
    return _predict(cfg, metadata, network, inputs, terminal) if words else 0


def _network_of_run(run_model: RunModel, cfg: PredictConfig, terminal: cli.Terminal) -> tuple[ModelMetadata, Network]:
    """The network of a run; the export and its card are written here."""
    metadata = run_model.metadata
    if cfg.card or cfg.export:
        from kmine.predict.card import model_card

        metadata = replace(metadata, card=model_card(run_model))
    if cfg.export:
        from kmine.models.onnx_export import encode_onnx

        target = Path(cfg.export).expanduser()
        terminal.log(f"exporting {run_model.weights} to {target}")
        write_atomic(target, encode_onnx(load_model(run_model), metadata.size, metadata.to_json()))
        write_atomic(target.with_name(CARD), metadata.card.encode())
    return metadata, TorchNetwork(lambda: load_model(run_model), cfg.device)


def _predict(
    cfg: PredictConfig, metadata: ModelMetadata, network: Network, inputs: Inputs, terminal: cli.Terminal
) -> int:
    out = Path(cfg.out).expanduser()
    window = cfg.window or metadata.window
    estimator, no_estimate_reason = load_estimator(metadata, cfg.tta)
    job = PredictJob(
        network,
        metadata,
        out,
        window,
        cfg.tta,
        cfg.batch_size or metadata.batch_size,
        cfg.probs,
        cfg.overlay,
        estimator,
    )
    estimator_settings = estimator.to_json() if estimator else None
    signatures = {
        item.name: sign(
            VERSION, metadata.signature, window, cfg.tta, cfg.probs, cfg.overlay, estimator_settings, file_stamps(item)
        )
        for item in inputs.readable
    }
    output_log = OutputLog(out)
    try:
        output_log.refuse_foreign(name for item in inputs.readable for name in job.names(item).values())
        rows = {
            item.name: row for item in inputs.readable if (row := output_log.done(item.name, signatures[item.name]))
        }
        pending = [item for item in inputs.readable if item.name not in rows]
        terminal.log(
            f"{len(inputs.readable)} images and volumes, {len(rows)} of them done before; model {metadata.name}, round "
            f"{metadata.round_idx}, trained with segmenter {metadata.segmenter}"
        )
        if metadata.intensity is None:
            terminal.log("how bright the training images were is not known of this run: nothing can be said of others")
        if no_estimate_reason:
            terminal.log(f"no estimated_dice: {no_estimate_reason}")
        terminal.start("predicting", len(pending))
        failed = [f"{skipped.path}: {skipped.problem}" for skipped in inputs.unreadable]
        for count, result in enumerate(predict_stream(job, pending), 1):
            rows[result.item.name] = _plain(result)
            if result.error:
                failed.append(result.error)
            else:
                output_log.add(
                    result.item.name, signatures[result.item.name], job.names(result.item).values(), _plain(result)
                )
            terminal.advance(count, f"{len(failed)} unreadable" if failed else "")
        table = [rows[item.name] for item in inputs.readable]
        table += [{"file": skipped.path, "error": skipped.problem} for skipped in inputs.unreadable]
        output_log.write_table(prediction_columns(metadata.class_names), table)
        if estimator:
            objects = ({"file": row["file"], **object_row} for row in table for object_row in row.get("objects", ()))
            output_log.write_table(OBJECT_COLUMNS, objects, OBJECTS)
        _write_classes(out, metadata, no_estimate_reason)
    finally:
        terminal.stop()
        output_log.close()
    return _summarise(table, failed, inputs.num_others, out, terminal)


def _plain(result: PredictResult) -> Row:
    return {**result.row, "file": printable(result.row["file"])}


def _write_classes(out: Path, metadata: ModelMetadata, no_estimate_reason: str) -> None:
    """What the values of the masks mean, the colours of the overlays, and what estimated_dice rests on."""
    of_each = zip(metadata.class_names, colours(len(metadata.class_names)).tolist(), strict=True)
    classes = [{"id": n, "name": name, "overlay_rgb": colour} for n, (name, colour) in enumerate(of_each)]
    values = {"classes": classes, "model": metadata.name, "round": metadata.round_idx, "signature": metadata.signature}
    values["estimated_dice"] = no_estimate_reason or local_quality_summary(metadata.alone or {})
    write_atomic(out / "classes.json", json.dumps(values, indent=1).encode())


def _summarise(table: Sequence[Row], failed: Sequence[str], num_others: int, out: Path, terminal: cli.Terminal) -> int:
    """Say what came of it; the exit code."""
    warned = sum(bool(row.get("warning")) for row in table)
    if len(failed) == len(table):
        raise UserError(f"none of {len(table)} images could be read, the first: {failed[0]}")
    text = f"{len(table) - len(failed)} predicted, {len(failed)} unreadable, {warned} with a warning; {out / TABLE}"
    terminal.log(text + (f"; {num_others} files of other kinds left alone" if num_others else ""))
    if failed:
        more = f" and {len(failed) - MAX_NAMED} more" if len(failed) > MAX_NAMED else ""
        terminal.log(f"unreadable: {'; '.join(failed[:MAX_NAMED])}{more}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
