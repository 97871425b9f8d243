"""The local model of a run folder: a checkpoint of a round and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine import cli
from kmine.config import LoopConfig
from kmine.data.io.windowing import LIVER_WINDOW
from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.io.files import sign
from kmine.predict.estimates import local_quality_of_run
from kmine.predict.metadata import ModelMetadata
from kmine.setup.finished import final_run, read_run_info, require_finished
from kmine.store.artifacts import CURE, fitting, read_tensors
from kmine.store.run_info import CURE as INFO_CURE
from kmine.store.run_info import is_plain
from kmine.store.settings import signed

if TYPE_CHECKING:
    from kmine.models.base import LocalModel

CHECKPOINTS = {"best": "model.safetensors", "final": "model_final.safetensors"}


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run, not yet loaded."""

    root: Path
    weights: Path
    cfg: LoopConfig
    run: Mapping[str, Any]
    metadata: ModelMetadata


def open_run_model(root: Path, round_idx: int | None, checkpoint: str) -> RunModel:
    """Locate a model of a run; the folder is not changed, torch is not loaded.

    Args:
        root: the run folder, or that of folds, of which the run on all masks is taken; `arm` in the run.json of a trial
            of a sweep locates its rounds.
        round_idx: round of the model; None: the kept one.
        checkpoint: a key of `CHECKPOINTS`.

    Raises:
        UserError: no run folder, an unfinished run without a given round, or no such round.
    """
    root = final_run(root)
    run = read_run_info(root)
    if not isinstance(run.get("class_names"), list):
        raise UserError(f"{root / 'run.json'}: expected class names, found none; resume the run")
    cfg = cli.load_config(LoopConfig, root / "config.yaml")
    method_dir = run.get("arm", "")
    if round_idx is None:
        require_finished(root, run, "resume it, or name a round with --round N")
        round_idx = int(run["adopted_round"])
    name, file = f"round_{round_idx:02d}", CHECKPOINTS[checkpoint]
    # Round 0 of a compared method is that of the loop.
    folders = [root / method_dir / name, *([root / name] if round_idx == 0 else [])]
    weights = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if weights is None:
        available = ", ".join(sorted(path.parent.name for path in (root / method_dir).glob(f"round_*/{file}")))
        raise UserError(
            f"{root}: no {checkpoint} model of round {round_idx}; there are {available or 'none'}: choose another with "
            "--round, or run the loop's command again"
        )
    return RunModel(root, weights, cfg, run, _metadata(root, run, cfg, round_idx, checkpoint, weights))


def load_model(run_model: RunModel) -> LocalModel:
    """The network with the checkpoint's weights, on the CPU.

    Raises:
        UserError: damaged weights, or those of another network.
    """
    from kmine.models.build import load_checkpoint

    model_cfg, num_classes = run_model.cfg.model.split()[0], len(run_model.metadata.class_names)
    found = read_tensors(run_model.weights)
    if found is None:
        raise UserError(f"{run_model.weights}: expected the weights of the run, found no such file; {CURE}")
    with fitting(run_model.weights):
        return load_checkpoint(model_cfg, num_classes, found[0]).with_patch(run_model.cfg.data.patch)


def _metadata(
    root: Path, run: Mapping[str, Any], cfg: LoopConfig, round_idx: int, checkpoint: str, weights: Path
) -> ModelMetadata:
    window = cfg.data.window or (LIVER_WINDOW if cfg.data.name == "lits" else None)
    model = cfg.model.split()[0]
    parts = [sha256_of(weights), cfg.data.size, window, run["class_names"], model.name, model.normalization]
    resizing = signed("data", {"resize": cfg.data.resize, "patch": cfg.data.patch})
    parts += [resizing] if resizing else []
    names = tuple(map(str, run.get("channels") or ()))
    local_quality, no_estimate = local_quality_of_run(root)
    folder = root.resolve()
    folder = folder.parent if final_run(folder.parent) == folder else folder
    metadata = ModelMetadata(
        name="".join(letter if is_plain(letter) else "_" for letter in folder.name),
        dataset=str(run.get("dataset", cfg.data.name)),
        class_names=tuple(map(str, run["class_names"])),
        size=cfg.data.size,
        window=(float(window[0]), float(window[1])) if window else None,
        resize=cfg.data.resize,
        channels=tuple(zip(cfg.data.channels or range(len(names)), names, strict=False)),
        batch_size=cfg.infer.batch_size,
        method=str(run.get("method", "mining")),
        segmenter=str(run.get("segmenter", "none")),
        round_idx=round_idx,
        checkpoint=checkpoint,
        signature=sign(*parts),
        intensity=run.get("intensity"),
        local_quality=local_quality,
        no_estimate=no_estimate,
    )
    metadata.check(str(root / "run.json"), INFO_CURE)
    return metadata
