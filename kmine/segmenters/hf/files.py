"""The files of a model: a local folder, or a repository of the Hugging Face hub. No torch is loaded."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from kmine.errors import UserError
from kmine.io.hub import hub_session
from kmine.io.json_file import parse_json

PREFIX = "hf:"
"""Of the names of these segmenters; an id of the hub or a folder follows."""
MODEL_TYPES = ("edgetam", "edgetam_video", "sam", "sam2", "sam2_video", "sam3_tracker", "sam3_video", "sam_hq")
"""`model_type` of config.json; of the video models and of SAM 3 the part that segments images is loaded."""
_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""Read only where there are no safetensors, and without executing code (`weights_only`)."""


def require_transformers() -> None:
    """Raise `UserError` unless transformers is installed."""
    if find_spec("transformers") is None:
        raise UserError(
            f"segmenter.name: models named {PREFIX} need the package transformers, which is not installed; "
            "pip install 'kmine[hf]'"
        )


def model_folder(model: str, offline: bool) -> Path:
    """The folder with the files of a model; an id of the hub is downloaded to the hub's own cache, if not there yet.

    Raises:
        UserError: no such folder or repository, a gated one, a failed or forbidden download, another kind of model.
    """
    folder = Path(model).expanduser()
    if not (model and folder.is_dir()):
        if folder.is_file() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise UserError(
                f"segmenter.name: expected {PREFIX} and an id of the hub, as in {PREFIX}facebook/sam-vit-base, or an "
                f"existing folder with config.json, got {model!r}; of a single file name the architecture: "
                "--segmenter.name medsam --segmenter.checkpoint FILE"
            )
        folder = _download(model, offline)
    _check_files(folder, model)
    return folder


def _download(model: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    address = f"https://huggingface.co/{model}"
    try:
        with hub_session(offline):
            folder = Path(snapshot_download(model, allow_patterns=[*_CONFIGS, *_SAFETENSORS]))
            if not any(folder.glob(_SAFETENSORS[0])):
                folder = Path(snapshot_download(model, allow_patterns=[*_CONFIGS, *_PICKLES]))
            return folder
    except GatedRepoError as error:
        problem = f"is gated: accept its licence at {address}, then log in (hf auth login) or set HF_TOKEN"
        raise UserError(f"segmenter.name: {model} {problem}, or name a local folder with --segmenter.name") from error
    except RepositoryNotFoundError as error:
        problem = f"expected a public model of the hub, found none of that name, or a private one; check {address}"
        raise UserError(f"segmenter.name: {model}: {problem}, or log in (hf auth login)") from error
    except LocalEntryNotFoundError as error:
        why = "--offline forbids the download" if offline else "the hub does not answer"
        folder = model.rpartition("/")[2]  # under another name MedSAM would be fed as SAM
        raise UserError(
            f"segmenter.name: {model} is not in the hub's cache and {why}; on a machine with network: hf download "
            f"{model} --local-dir {folder}, carry that folder here, --segmenter.name {PREFIX}{folder}"
        ) from error
    except Exception as error:  # huggingface_hub and httpx raise many
        raise UserError(
            f"segmenter.name: {model} could not be downloaded ({type(error).__name__}); try again, or download it by "
            f"other means and name its folder: --segmenter.name {PREFIX}FOLDER"
        ) from error


def _check_files(folder: Path, model: str) -> None:
    """Refuse a folder without the files of a promptable model."""
    weights = [path for pattern in (_SAFETENSORS[0], _PICKLES[0]) for path in folder.glob(pattern)]
    lacking = [name for name in ("config.json",) if not (folder / name).is_file()]
    lacking += [] if any((folder / name).is_file() for name in _CONFIGS[1:]) else ["preprocessor_config.json"]
    lacking += [] if weights else ["model.safetensors"]
    if lacking:
        raise UserError(
            f"{folder}: expected the files of a model of transformers, {', '.join(lacking)} is missing; download the "
            "whole repository (hf download), or of a single file name the architecture: --segmenter.name medsam "
            "--segmenter.checkpoint FILE"
        )
    path = folder / "config.json"
    config = parse_json(path.read_bytes(), str(path), "the settings of a model", "download it again")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(
            f"segmenter.name: {model} is a model of type {kind!r}, expected a promptable one, such as "
            f"{PREFIX}facebook/sam-vit-base or {PREFIX}facebook/sam2.1-hiera-tiny; its config.json must have one of "
            f"the types {', '.join(MODEL_TYPES)}"
        )
