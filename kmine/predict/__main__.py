"""`python -m kmine.predict RUN INPUT...`: masks of new images by the local model of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kmine import cli
from kmine.errors import UserError
from kmine.io.files import write_atomic
from kmine.predict.files import PredictConfig, files_summary, predict_files
from kmine.predict.inputs import find_inputs, inputs_of_channels
from kmine.predict.metadata import ModelMetadata
from kmine.predict.network import Network, TorchNetwork, open_onnx
from kmine.predict.run_model import RunModel, load_model, open_run_model

DESCRIPTION = """Predict masks of new images with the local model of a run (its kept round, the checkpoint in
use), or with an exported model. RUN_INPUTS: first the run folder or FILE.onnx, then images (PNG, JPEG, TIFF,
DICOM), volumes (NIfTI), DICOM series (their folders), and folders of all these. The same command resumes an interrupted
one. Exit code 1: some files are unreadable. Not a medical device."""

CARD = "model_card.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine predict", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(PredictConfig, words, prog=prog, description=DESCRIPTION, positional="run_inputs")
    return cli.guarded(prog, lambda: run_predict(cfg))


def run_predict(cfg: PredictConfig) -> int:
    """Open the model; write the requested export, card and masks. Returns the exit code."""
    terminal = cli.Terminal()
    first, *words = cfg.run_inputs
    path = Path(first)
    if not words and not (cfg.export or cfg.card):
        cure = "name files or folders, or pass --export FILE.onnx"
        raise UserError(f"{first}: expected images after it, got none; {cure}")
    is_exported = path.suffix.lower() == ".onnx" and not path.is_dir()
    if is_exported and (cfg.export or cfg.round is not None or cfg.checkpoint != "best"):
        raise UserError(f"{first}: --export, --round and --checkpoint need a run folder, got an exported model")
    # Inputs are checked before the network is loaded, which takes seconds.
    run_model = None if is_exported else open_run_model(path, cfg.round, cfg.checkpoint)
    inputs = find_inputs(words, Path(cfg.out))
    metadata, network = (run_model.metadata, None) if run_model else open_onnx(path, cfg.device)
    if metadata.channels:
        inputs = inputs_of_channels(inputs, dict(metadata.channels))
    if words and not inputs.readable and not inputs.unreadable:
        raise UserError(f"expected images, found none among {', '.join(words)}; name other files or folders")
    if run_model:
        metadata, network = _network_of_run(run_model, cfg, terminal)
    if cfg.card:
        write_atomic(Path(cfg.out) / CARD, metadata.card.encode())
    if not words:
        return 0
    try:
        predicted = predict_files(cfg, metadata, network, inputs, terminal)
    finally:
        terminal.stop()
    for line in files_summary(predicted, inputs, Path(cfg.out)):
        terminal.log(line)
    return 1 if predicted.errors else 0


def _network_of_run(run_model: RunModel, cfg: PredictConfig, terminal: cli.Terminal) -> tuple[ModelMetadata, Network]:
    """The network of a run; writes the export and its card."""
    metadata = run_model.metadata
    if cfg.card or cfg.export:
        from kmine.predict.card import model_card

        metadata = replace(metadata, card=model_card(run_model))
    if cfg.export:
        from kmine.models.onnx_export import encode_onnx

        if run_model.cfg.data.patch:
            cure = "predict with the run folder itself"
            raise UserError(f"{run_model.root}: expected a model of whole images, got one of data.patch; {cure}")
        target = Path(cfg.export)
        terminal.log(f"exporting {run_model.weights} to {target}")
        write_atomic(target, encode_onnx(load_model(run_model), metadata.size, metadata.to_json()))
        write_atomic(target.with_name(CARD), metadata.card.encode())
    return metadata, TorchNetwork(lambda: load_model(run_model), cfg.device)


if __name__ == "__main__":
    sys.exit(main())
